"""Runs a function on gloo ranks, each a process of its own; and an engine's step."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.objective.objective import Losses, ModelInputs
from tests.forked import CONTEXT


class Taken(NamedTuple):
    """An optimizer step: `losses` of each micro-batch, without their graphs."""

    losses: list[Losses]
    grad_norm: float
    applied: bool


def take_step(engine: PretrainEngine, micro_batches: Sequence[ModelInputs], lr: float) -> Taken:
    """As the trainer does it."""
    engine.begin_step()
    losses = [engine.backward(engine.forward(inputs)) for inputs in micro_batches]
    return Taken(losses, *engine.update(lr))


def _worker(rank: int, world_size: int, store: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    function(*arguments)
    # A rank that leaves while another still reads from it takes that one down with it.
    dist.barrier()
    dist.destroy_process_group()


def run_on_ranks(world_size: int, function: Callable[..., None], *arguments: Any, timeout: float = 200) -> None:
    """Raises what the first failing rank raised; ends all ranks after `timeout` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        context = mp.start_processes(
            _worker,
            (world_size, store, function, arguments),
            nprocs=world_size,
            join=False,
            start_method=CONTEXT.get_start_method(),
        )
        assert context is not None
        deadline = time.monotonic() + timeout
        while not context.join(timeout=1):  # True once all have ended; raises when one has failed
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} on {world_size} ranks did not end in {timeout} s")
