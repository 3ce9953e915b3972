"""The pool of processes that shard tools use."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from data_tools.pool import unordered_map
from mepa_ds.errors import UserError


def square(number: int) -> int:
    return number * number


def refuse(noted: Path, number: int) -> int:
    (noted / str(number)).touch()
    if number == 3:
        raise UserError("number 3 is damaged")
    time.sleep(0.05)
    return number


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_item_once(workers: int) -> None:
    assert sorted(unordered_map(square, range(20), workers)) == [number**2 for number in range(20)]
    assert list(unordered_map(square, [], workers)) == []


def test_the_first_error_ends_the_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^number 3 is damaged$"):
        list(unordered_map(partial(refuse, tmp_path), range(1000), 2))
    assert len(list(tmp_path.iterdir())) < 100


@pytest.mark.timeout(60)
def test_a_killed_worker_ends_the_work_with_a_message() -> None:
    with pytest.raises(UserError, match=r"a worker process was killed, .*fewer --workers"):
        list(unordered_map(die, range(20), 2))
