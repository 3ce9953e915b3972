"""Batches taken by all ranks together: when one rank's loader fails, all ranks raise, and none waits for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from mepa_ds import distributed, log
from mepa_ds.errors import UserError

BatchT = TypeVar("BatchT")


def lockstep(batches: Iterator[BatchT]) -> Iterator[BatchT]:
    """Passes batches on. Before each batch the ranks agree that all of them have one. Collective for every batch.

    One integer is reduced over gloo, on the CPU, so that nothing waits for work queued on a GPU.

    Raises:
        UserError: on every rank, with the message of the first rank whose loader raised one.
    """
    if distributed.world_size() == 1:
        yield from batches
        return
    group = dist.new_group(backend="gloo")
    while True:
        batch, error = None, None
        try:
            batch = next(batches, None)
        except UserError as raised:
            error = raised
        failed = torch.tensor([error is not None], dtype=torch.int32)
        dist.all_reduce(failed, dist.ReduceOp.MAX, group)  # type: ignore[arg-type]
        if failed.item():
            distributed.agree(error)
        if batch is None:
            dist.destroy_process_group(group)
            return
        yield batch


def report_damaged(lines: Sequence[str]) -> None:
    """Writes a line into the log for each damaged sample that was replaced, on the rank that read it."""
    for line in lines:
        log.note(f"rank {distributed.rank()}: damaged sample replaced: {line}")
