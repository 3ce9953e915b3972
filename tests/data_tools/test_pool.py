"""The pool of processes that shard tools use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from mepa_ds.data_tools.pool import unordered_map
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


INTERRUPTED = """
import sys, time
from functools import partial
from pathlib import Path
from mepa_ds.data_tools.pool import unordered_map
from mepa_ds.command_line import entry

def write(folder, number):
    (folder / f"begun_{number}").touch()
    while not (folder / "gate").exists():
        time.sleep(0.01)
    (folder / f"done_{number}").touch()

if __name__ == "__main__":
    entry.run(lambda: list(unordered_map(partial(write, Path(sys.argv[1])), range(9), 2)))
"""


@pytest.mark.timeout(120)
def test_an_interrupt_of_the_whole_group_completes_what_is_being_written(tmp_path: Path) -> None:
    """Ctrl-C reaches workers too, which leave it to the process that started them."""
    (tmp_path / "program.py").write_text(INTERRUPTED)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while len(list(tmp_path.glob("begun_*"))) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None
        assert (
            process.stderr.readline()
            == "stopping once the shards under way are complete; another signal stops at once\n"
        )
        (tmp_path / "gate").touch()
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert errors.startswith("stopped (SIGINT); what is complete is kept.")
    assert errors.count("\n") == 2
    assert {path.name for path in tmp_path.glob("done_*")} == {"done_0", "done_1"}
