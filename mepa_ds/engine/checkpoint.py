"""Copies an engine's state into fragments, and restores it from a checkpoint of any topology."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mepa_ds import distributed
from mepa_ds.checkpoint.fragment import EMA, Fragment
from mepa_ds.checkpoint.state import RunState
from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.engine.fragments import (
    adam_step,
    buffer_fragments,
    loss_scaler_state,
    parameter_fragments,
    set_adam_step,
    set_loss_scaler_state,
)

_LEAST_REGISTERED = 2**22
"""Bytes from which on a buffer has memory pages of its own, which can be pinned by themselves."""


class Staging:
    """Makes CPU copies of device state, in reused memory (pinned if there is a GPU)."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def copy(self, flats: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        copies = {kind: [self._copy(kind, i, t) for i, t in enumerate(tensors)] for kind, tensors in flats.items()}
        if distributed.uses_gpu():
            torch.cuda.synchronize()
        return copies

    def _copy(self, kind: str, index: int, source: Tensor) -> Tensor:
        buffer = self._buffers.get((kind, index))
        if buffer is None:
            buffer = pinned_like(source) if source.is_cuda else torch.empty_like(source)
            self._buffers[kind, index] = buffer
        return buffer.copy_(source, non_blocking=True)


def pinned_like(source: Tensor) -> Tensor:
    """Returns CPU memory for a copy of `source` that a GPU makes by itself, to be kept until the process ends.

    PyTorch's own pinned memory would be rounded up to a power of two: 24 GiB for 17.
    """
    if source.nbytes >= _LEAST_REGISTERED:
        buffer = torch.empty_like(source, device="cpu")
        if int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)) == 0:
            return buffer
    return torch.empty_like(source, device="cpu", pin_memory=True)


def optimizer_facts(engine: PretrainEngine) -> dict[str, Any]:
    """Returns the optimizer's fields of RunState: its state besides tensors."""
    return {"adam_step": adam_step(engine.zero), "loss_scaler": loss_scaler_state(engine.zero)}


def stage(engine: PretrainEngine, staging: Staging, kinds: tuple[str, ...]) -> list[Fragment]:
    """Returns CPU copies of all pieces that this rank owns, and on the main rank of the model's buffers as well."""
    model = engine.objective
    fragments = list(parameter_fragments(model, staging.copy(engine.flats(kinds))))
    if distributed.is_main():
        fragments += [replace(fragment, data=fragment.data.cpu().clone()) for fragment in buffer_fragments(model)]
    return fragments


def restore(engine: PretrainEngine, path: Path, state: RunState) -> None:
    """Fills the engine from a checkpoint that any number of ranks wrote, at any ep_size. Collective.

    If the run wants an average of the weights and the checkpoint has none, the average starts as the weights.
    """
    from mepa_ds.checkpoint.store import load_fragments, stored_tensors

    has_average = any(name.startswith(f"{EMA}/") for name in stored_tensors(path))
    kinds = [kind for kind in engine.kinds if kind != EMA or has_average]
    fragments = list(parameter_fragments(engine.objective, engine.flats(tuple(kinds))))
    load_fragments([*fragments, *buffer_fragments(engine.objective)], path)
    set_adam_step(engine.zero, state.adam_step)
    set_loss_scaler_state(engine.zero, state.loss_scaler)
    engine.restored(has_average)
