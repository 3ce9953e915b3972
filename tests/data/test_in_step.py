"""A damaged shard on one rank ends all ranks, with its message and without a hang."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mepa_ds.data.in_step import in_step
from mepa_ds.errors import DamagedError, UserError


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
        for batch in in_step(batches_of_rank(rank)):
            taken.append(batch)
    except UserError as error:
        (directory / f"error-{rank}").write_text(f"{taken}: {error}")
    whole = in_step(iter(range(2000)))
    next(whole)
    start = time.perf_counter()
    assert sum(1 for _ in whole) == 1999
    (directory / f"milliseconds-{rank}").write_text(str((time.perf_counter() - start) / 2))
    dist.destroy_process_group()


def test_all_ranks_end_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(run_rank, (port, tmp_path), nprocs=2, start_method="spawn")
    for rank in range(2):
        message = (tmp_path / f"error-{rank}").read_text()
        assert message == "[0, 1, 2, 3, 4]: rank 1: shard-000003.tar: sample '7' is damaged"
        assert float((tmp_path / f"milliseconds-{rank}").read_text()) < 50


def test_one_process_needs_no_group() -> None:
    assert list(itertools.islice(in_step(itertools.count()), 3)) == [0, 1, 2]
