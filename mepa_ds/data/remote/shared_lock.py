"""One process or thread at a time works on a file of a directory that several share.

A lock only saves work: whoever has waited finds the file written. Nothing breaks without it, since files appear whole.
Where a file system has no `flock` (Lustre without -o flock, some NFS), a coarser way is therefore enough: a claim, a
file that only one process can create. Its owner touches it while it lives, and others remove it when it has not been
touched for some time. Each waiting process measures that time by its own clock: file servers have other clocks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mepa_ds.errors import UserError
from mepa_ds.files import naming_full_disks
from mepa_ds.safety.places import make_new, open_lock, open_no_link, temporary_name

_TOUCH_SECONDS = 5.0
_STALE_SECONDS = 40.0
"""Longer than a client of a file server caches facts about a file, and than a busy machine lets a thread wait."""
_ASK_SECONDS = 0.1


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of `path`, which need not exist; its directory is made.

    Yields:
        Whether the lock is held; False only without `wait`, when another has it.

    Raises:
        UserError: nothing can be written in the directory.
    """
    with _open(path) as file:
        try:
            how = _flock(file, wait)
        except OSError:  # for whatever reason, this file system does not lock
            with _claimed(path.with_name(f".{path.name}.claim"), wait) as held:
                yield held
            return
        try:
            yield how
        finally:
            if how:
                # Closing would not do: a worker that was forked meanwhile has the file open too.
                fcntl.flock(file, fcntl.LOCK_UN)


def _open(path: Path) -> IO[bytes]:
    place = path.with_name(f".{path.name}.lock")
    for _ in range(10):  # somebody may be removing the directory
        try:
            with naming_full_disks(place):
                path.parent.mkdir(parents=True, exist_ok=True)
                return open_lock(place)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK, errno.EINVAL):
                raise UserError(
                    f"{place}: a link or a device lies where a lock is to be; remove it, or give another directory "
                    "(cache in remote.json)"
                ) from error
            raise UserError(
                f"{path.parent}: cannot write there: {error.strerror}; get the right to write there, or give another "
                "directory (cache in remote.json)"
            ) from error
    raise UserError(f"{path.parent}: is removed again and again; give another directory (cache in remote.json)")


def _flock(file: IO[bytes], wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _claimed(claim: Path, wait: bool) -> Iterator[bool]:
    seen, since = None, time.monotonic()
    while not _make(claim):
        if not wait:
            yield False
            return
        if (mark := _mark(claim)) != seen:
            seen, since = mark, time.monotonic()
        elif time.monotonic() - since > _STALE_SECONDS:  # its owner is dead
            _remove(claim)
        time.sleep(_ASK_SECONDS)
    done = threading.Event()
    keeper = threading.Thread(target=_keep, args=(claim, done), daemon=True)
    keeper.start()
    try:
        yield True
    finally:
        done.set()
        keeper.join()
        with suppress(OSError):
            claim.unlink()


def _make(claim: Path) -> bool:
    with naming_full_disks(claim), suppress(FileNotFoundError):  # the directory was removed
        try:
            make_new(claim, 0o600)
        except FileExistsError:
            return False
    return True


def _mark(claim: Path) -> tuple[int, int] | None:
    """Changes whenever the owner touches the claim. Some file systems ask their server only when a file is opened."""
    with suppress(OSError):
        descriptor = open_no_link(claim, os.O_RDONLY)
        try:
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        return found.st_ino, found.st_mtime_ns
    return None


def _remove(claim: Path) -> None:
    """Removes a claim by a rename, in which one process succeeds. If it hits a newer claim, work is done twice."""
    aside = temporary_name(claim)
    with suppress(OSError):
        os.rename(claim, aside)
        aside.unlink()


def _keep(claim: Path, done: threading.Event) -> None:
    while not done.wait(_TOUCH_SECONDS):
        with suppress(OSError):
            os.utime(claim)
