"""A damaged shard on one rank ends all ranks, with its message and without a hang."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mepa_ds.data.lockstep import lockstep
from mepa_ds.errors import DamagedError, UserError
from tests.tiny_run import free_port


def batches_of_rank(rank: int) -> Iterator[int]:
    yield from range(5)
    if rank == 1:
        raise DamagedError("shard-000003.tar: sample '7' is damaged")
    yield from range(5, 1000)


def run_rank(rank: int, port: int, directory: Path) -> None:
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    taken = []
    try:
        for batch in lockstep(batches_of_rank(rank)):
            taken.append(batch)
    except UserError as error:
        (directory / f"error-{rank}").write_text(f"{taken}: {error}")
    whole, best = lockstep(iter(range(400))), float("inf")
    for _ in range(20):  # the best of them: others share the machine
        start = time.perf_counter()
        assert sum(1 for _ in itertools.islice(whole, 20)) == 20
        best = min(best, time.perf_counter() - start)
    assert next(whole, None) is None
    (directory / f"milliseconds-{rank}").write_text(str(best * 50))
    dist.destroy_process_group()


@pytest.mark.processes
def test_all_ranks_end_together(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(run_rank, (free_port(), tmp_path), nprocs=2, start_method="spawn")
    for rank in range(2):
        message = (tmp_path / f"error-{rank}").read_text()
        assert message == "[0, 1, 2, 3, 4]: rank 1: shard-000003.tar: sample '7' is damaged"
        assert float((tmp_path / f"milliseconds-{rank}").read_text()) < 50


def test_one_process_needs_no_group() -> None:
    assert list(itertools.islice(lockstep(itertools.count()), 3)) == [0, 1, 2]
