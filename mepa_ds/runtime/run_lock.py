"""Allows one start at a time in an output_dir. The main rank's process holds a lock, which ends with the process."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from mepa_ds import log
from mepa_ds.errors import UserError
from mepa_ds.safety.places import open_lock, open_no_link
from mepa_ds.safety.text import printable

LOCK_NAME = ".lock"
_FLOCK = "@hhqqi"  # struct flock of 64-bit Linux: type, whence, start, length, process
# A file server keeps a lost node's lock for some time (NFSv4: a lease of 90 s).
_LOST_NODE_SECONDS = 180.0
_MOST_BYTES = 512


class RunLock:
    """A lock that is held from `take` to `release`. On file systems without locks, nothing is locked.

    It is a POSIX record lock: forked workers, which may outlive a killed rank by seconds, do not inherit it.
    """

    def __init__(self, directory: Path, what: str = "output_dir"):
        self._directory, self._what = directory, what
        self._file: IO[bytes] | None = None

    def take(self) -> None:
        """Takes the lock. Raises UserError when another process holds it.

        A job that SLURM has requeued waits for a lost node's lock to expire, and then continues without the lock. This
        is safe, because SLURM does not run a job twice, and our job scripts wait for the ranks of the old start.
        """
        self._file = _open(self._directory / LOCK_NAME)
        requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
        end, told = time.monotonic() + (_LOST_NODE_SECONDS if requeued else 0.0), False
        while self._file is not None and not _try(self._file):
            owner = _owner(self._file)
            if time.monotonic() >= end:
                self.release()
                if requeued:
                    log.note(f"warning: {owner} still holds {self._directory / LOCK_NAME}; going on without it")
                    return
                raise UserError(
                    f"{self._what}: {self._directory}: another start is at work there ({owner}); wait for it, stop it, "
                    f"or choose another {self._what}"
                )
            if not told:
                log.note(f"waiting for {owner} to leave {self._directory}")
                told = True
            time.sleep(1)
        if self._file is not None:
            with suppress(OSError):  # a full disk is reported elsewhere
                self._file.truncate(0)
                self._file.seek(0)
                self._file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def is_held(directory: Path) -> bool:
    """Returns whether another process holds the lock. A process that holds it must not ask: it would lose its lock.

    It only asks the system. Taking the lock to see whether that is possible would now and then refuse a start that
    tries to take it at the same moment.
    """
    try:
        file = open(open_no_link(directory / LOCK_NAME, os.O_RDWR), "r+b", buffering=0)  # noqa: SIM115
    except OSError:
        return False
    with file:
        try:
            found = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except OSError:  # a file system without locks
            return False
        return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)


def _open(path: Path) -> IO[bytes] | None:
    with suppress(OSError):
        return open_lock(path, 0o666)
    with suppress(OSError):  # a link, or another user's lock file in a directory that both may write to
        path.unlink()
        return open_lock(path, 0o666)
    return None


def _try(file: IO[bytes]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _owner(file: IO[bytes]) -> str:
    file.seek(0)
    return printable(file.read(_MOST_BYTES).decode(errors="replace").strip()) or "an unknown process"
