"""One at a time, on file systems with flock and without."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mepa_ds.data.remote import shared_lock
from mepa_ds.data.remote.shared_lock import locked
from mepa_ds.errors import UserError

WITHOUT = ("ENOSYS", "ENOLCK", "EOPNOTSUPP", "ENOTSUP", "EINVAL", "EBADF")


@pytest.fixture(params=["flock", "ENOSYS"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With flock, and without."""
    if request.param != "flock":
        forbid_flock(monkeypatch, request.param)
    return str(request.param)


def forbid_flock(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    number = getattr(errno, reason)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(shared_lock, "_ASK_SECONDS", 0.005)


@pytest.mark.usefixtures("way")
def test_threads_and_processes_exclude_each_other(tmp_path: Path) -> None:
    """Each adds one to a number that it reads and writes in two steps, with a pause between."""
    number = tmp_path / "number"
    number.write_text("0")

    def add() -> None:
        with locked(tmp_path / "x") as held:
            assert held
            before = int(number.read_text())
            time.sleep(0.005)
            number.write_text(str(before + 1))

    def add_thrice() -> None:
        for _ in range(3):
            add()

    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            try:
                add_thrice()
            finally:
                os._exit(0)
        children.append(child)
    threads = [threading.Thread(target=add_thrice) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert number.read_text() == "15"


@pytest.mark.usefixtures("way")
def test_without_waiting(tmp_path: Path) -> None:
    with locked(tmp_path / "to" / "x"):
        with locked(tmp_path / "to" / "x", wait=False) as held:
            assert not held
        with locked(tmp_path / "to" / "y", wait=False) as held:
            assert held
    with locked(tmp_path / "to" / "x", wait=False) as held:
        assert held


@pytest.mark.usefixtures("way")
def test_a_worker_that_was_forked_meanwhile_does_not_keep_it(tmp_path: Path) -> None:
    """It has the file open too, as long as it lives."""
    gate, other = os.pipe()
    with locked(tmp_path / "x"):
        if (child := os.fork()) == 0:
            os.close(other)
            os.read(gate, 1)
            os._exit(0)
    with locked(tmp_path / "x", wait=False) as held:
        assert held
    os.close(other)
    os.waitpid(child, 0)


@pytest.mark.parametrize("reason", WITHOUT)
def test_whatever_a_file_system_says_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    forbid_flock(monkeypatch, reason)
    with locked(tmp_path / "x"), locked(tmp_path / "x", wait=False) as held:
        assert not held
    assert [path.name for path in tmp_path.iterdir()] == [".x.lock"]


class Waiting:
    """A clock that goes on by 10 s whenever somebody waits, and then does something."""

    def __init__(self, then: Callable[[int], None]):
        self._then, self.num_waits = then, 0

    def monotonic(self) -> float:
        return 10.0 * self.num_waits

    def sleep(self, _: float) -> None:
        self.num_waits += 1
        self._then(self.num_waits)


@pytest.mark.parametrize("hours", [-100, 0, 100])
def test_a_claim_of_the_dead_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """Whatever the time that a file server gave it."""
    forbid_flock(monkeypatch, "ENOLCK")
    clock = Waiting(lambda _: None)
    monkeypatch.setattr(shared_lock, "time", clock)
    claim = tmp_path / ".x.claim"
    claim.touch()
    os.utime(claim, (time.time() + hours * 3600,) * 2)
    with locked(tmp_path / "x") as held:
        assert held
    assert 4 <= clock.num_waits <= 7  # 40 s
    assert [path.name for path in tmp_path.iterdir()] == [".x.lock"]


def test_a_claim_of_the_living_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_flock(monkeypatch, "ENOLCK")
    claim = tmp_path / ".x.claim"

    def touch(num_waits: int) -> None:
        os.utime(claim, (num_waits, num_waits))  # every 10 s
        if num_waits == 30:
            claim.unlink()

    clock = Waiting(touch)
    monkeypatch.setattr(shared_lock, "time", clock)
    claim.touch()
    with locked(tmp_path / "x") as held:
        assert held
    assert clock.num_waits == 30


def test_who_holds_a_claim_touches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_flock(monkeypatch, "ENOLCK")
    monkeypatch.setattr(shared_lock, "_TOUCH_SECONDS", 0.005)
    with locked(tmp_path / "x"):
        os.utime(tmp_path / ".x.claim", (0, 0))
        deadline = time.monotonic() + 60
        while (tmp_path / ".x.claim").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.mark.usefixtures("way")
def test_a_directory_that_is_removed_meanwhile(tmp_path: Path) -> None:
    with locked(tmp_path / "to" / "x"):
        for path in (tmp_path / "to").iterdir():
            path.unlink()
        (tmp_path / "to").rmdir()
    with locked(tmp_path / "to" / "x") as held:
        assert held


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at-all")
    for name in ("file", "dangling"):
        with pytest.raises(UserError, match=rf"{name}: cannot write there: .*; .*cache in remote\.json"):
            locked(tmp_path / name / "x").__enter__()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="cannot write there: Read-only file system"):
        locked(tmp_path / "x").__enter__()
