"""How a block runs on the tokens of one scale: as it is, or compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from mepa_ds.models.block import BlockRunner, run_scale_of
from mepa_ds.models.moe.layer import MoEFeedForward
from mepa_ds.safety.compilers import keep_compiled_code_private

BACKEND = "inductor"


@contextmanager
def block_runner(model: nn.Module, compiled: bool) -> Iterator[BlockRunner]:
    """Yields what runs a block of the model.

    Compiled, all blocks and scales of a batch size share their code, which is made three times: for the first scale,
    which is one token, for the last one, which fills the cache, and for those between. As in training, the way of
    tokens to their experts is left out of it.
    """
    if not compiled:
        yield run_scale_of
        return
    layers = [layer for layer in model.modules() if isinstance(layer, MoEFeedForward)]
    dispatchers = [layer.dispatcher for layer in layers]
    for layer in layers:
        layer.dispatcher = torch.compiler.disable(layer.dispatcher)
    try:
        yield _compiled(BACKEND)
    finally:
        for layer, dispatcher in zip(layers, dispatchers, strict=True):
            layer.dispatcher = dispatcher


@cache
def _compiled(backend: str) -> BlockRunner:
    keep_compiled_code_private()
    return torch.compile(run_scale_of, dynamic=True, backend=backend)
