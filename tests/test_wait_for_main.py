"""Work that the main rank does alone, for longer than a collective may take."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from mepa_ds import distributed
from mepa_ds.errors import UserError
from tests.forked import CONTEXT
from tests.tiny_run import free_port


def slowly() -> str:
    time.sleep(4)
    return "done"


def badly() -> str:
    raise UserError("no such file")


def take(rank: int, port: int, results: Any) -> None:
    place = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=place, timeout=timedelta(seconds=3), rank=rank, world_size=2)
    waits: list[int] = []
    found = distributed.wait_for_main(slowly, lambda: waits.append(1))
    try:
        distributed.wait_for_main(badly, lambda: None)
    except UserError as error:
        results.put((rank, found, len(waits), str(error)))
    distributed.stop()


def test_the_others_wait_beyond_the_time_out_of_a_collective() -> None:
    results, port = CONTEXT.Queue(), free_port()
    processes = [CONTEXT.Process(target=take, args=(rank, port, results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    told = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert [(rank, found) for rank, found, _, _ in told] == [(0, "done"), (1, None)]
    assert all(waits >= 2 for _, _, waits, _ in told)
    assert all("no such file" in error for *_, error in told)


def test_alone_it_is_a_call() -> None:
    assert distributed.wait_for_main(lambda: 3, lambda: None) == 3
    with pytest.raises(UserError, match="no such file"):
        distributed.wait_for_main(badly, lambda: None)
