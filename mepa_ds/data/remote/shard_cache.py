"""The bounded local cache of a remote set's tars, fetched ahead in the order of use. Processes and jobs may share it.

Any of them may remove any tar at any time, to make room. A reader is therefore given an open file, not a path: a tar is
opened before others can see it, and an open file stays readable when its name is gone.

The directory may lie where others can write, such as /tmp. Each user has one of their own in it, which nobody else may
enter, and only files of this user are used (mepa_ds.data.remote.cache_places), whose SHA-256 has been compared once.
"""

from __future__ import annotations

import errno
import glob
import math
import os
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mepa_ds.data.remote.cache_places import (
    cache_directory,
    is_noted,
    make_private,
    note_of,
    note_verified,
    read_note,
    sha256_of,
    write_note,
)
from mepa_ds.data.remote.fetching import Check, content_of, fetch
from mepa_ds.data.remote.remote_file import REMOTE_NAME, RemoteShards
from mepa_ds.data.remote.shared_lock import locked
from mepa_ds.data.remote.urls import short_name
from mepa_ds.data.shards.index import ShardEntry
from mepa_ds.data.shards.open_files import OpenFile
from mepa_ds.errors import DamagedError, UserError
from mepa_ds.log import note
from mepa_ds.safety.places import is_own_file

_RETRY_AFTER_SECONDS = 300.0
_BEGAN = time.monotonic()
_FETCHERS = 2
_MOST_ROOM_MADE = 3
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NOT_THERE = (errno.ENOENT, errno.ESTALE, errno.EACCES, errno.ENOTDIR, errno.ELOOP, errno.EMLINK, errno.EINVAL)
"""Errors for a cached file that another process removed, replaced (by a link, a device) or made unreadable: it is then
fetched."""


class ShardCache:
    """The local copies of a remote set's tars. Pickles; threads and processes may share the directory.

    Raises:
        UserError: the cache is too small for the windows it must hold: the last, the current and the next.
    """

    def __init__(self, remote: RemoteShards, entries: Sequence[ShardEntry], what: str):
        if len(remote.urls) != len(entries):
            raise UserError(
                f"{what}: {REMOTE_NAME} names {len(remote.urls)} shards, the index {len(entries)}; "
                "write them again, by `mepa data remote` or `scan`"
            )
        self._remote, self._entries = remote, entries
        self._max_bytes = round(remote.cache_gigabytes * 1e9)
        self._names = [short_name(entry.name) for entry in entries]
        self._what = f"{what}: cache in {REMOTE_NAME}"
        self.directory = cache_directory(remote, entries, what)
        largest = max((entry.bytes for entry in entries), default=0)
        needed = 3 * min(remote.window, len(entries)) * largest
        if self._max_bytes < min(needed, sum(entry.bytes for entry in entries)):
            raise UserError(
                f"{what}: cache_gigabytes {remote.cache_gigabytes} in {REMOTE_NAME} is less than three windows of "
                f"{remote.window} shards ({needed / 1e9:.3g} GB); raise it or lower the window"
            )
        self._wanted: queue.SimpleQueue[int] | None = None
        self._failures: dict[int, tuple[float, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_wanted": None}

    def open(self, shard: int) -> OpenFile:
        """The local copy of a shard, fetched now if it is not there.

        A shard that could not be fetched is not tried again for some minutes: a run that skips its samples
        (on_damaged="skip") does not wait for each of them.

        Raises:
            DamagedError: it cannot be fetched.
            UserError: it cannot be stored.
        """
        since, reason = self._failures.get(shard, (-math.inf, ""))
        if time.monotonic() - since < _RETRY_AFTER_SECONDS:
            raise DamagedError(reason)
        try:
            return self._open(shard)
        except DamagedError as error:
            self._failures[shard] = (time.monotonic(), str(error))
            raise

    def _open(self, shard: int) -> OpenFile:
        path = self.directory / self._names[shard]
        make_private(self.directory, self._remote, self._what)
        file = self._at_hand(shard)
        if file is None:
            file = self._fetched(shard)
            self._evict(self._max_bytes, keep=path)
        with suppress(OSError):  # removed meanwhile
            # The least recently used go first. The time of its content stays: by this it is known to be verified.
            os.utime(path, ns=(time.time_ns(), os.fstat(file.descriptor).st_mtime_ns), follow_symlinks=False)
        return file

    def _at_hand(self, shard: int) -> OpenFile | None:
        """The copy in the cache, if there is one: this user's own, of the right size and SHA-256."""
        path, entry = self.directory / self._names[shard], self._entries[shard]
        try:
            file = OpenFile(str(path))
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            return None
        if path.is_symlink() or not is_own_file(file.descriptor):
            return None
        if os.fstat(file.descriptor).st_size != entry.bytes:
            return None
        if not entry.sha256 or is_noted(path, file.descriptor, entry.sha256):
            return file
        if sha256_of(file.descriptor) != entry.sha256:
            return None
        note_verified(path, file.descriptor, entry.sha256)
        return file

    def _fetched(self, shard: int) -> OpenFile:
        path = self.directory / self._names[shard]
        with locked(path):
            if (file := self._at_hand(shard)) is not None:  # another process was first
                return file
            failure = path.with_name(f".{path.name}.failed")
            if (known := _recent(failure)) is not None:
                raise DamagedError(known)
            _remove_leftovers(path)
            try:
                file = self._copied(shard, path)
            except DamagedError as error:
                write_note(failure, {"boot": _boot(), "at": time.monotonic(), "message": str(error)})
                raise
            failure.unlink(missing_ok=True)
            if self._entries[shard].sha256:
                note_verified(path, file.descriptor, self._entries[shard].sha256)
            return file

    def _copied(self, shard: int, path: Path) -> OpenFile:
        """Fetches a shard. If the disk is full before the cache is, older shards are removed first."""
        opened: list[OpenFile] = []
        entry = self._entries[shard]
        check: Check = content_of(entry.sha256, entry.bytes)

        def keep(temporary: Path, digest: str) -> None:
            check(temporary, digest)
            temporary.chmod(0o600)  # what others could write is not used
            opened.append(OpenFile(str(temporary)))

        for attempt in range(_MOST_ROOM_MADE + 1):
            try:
                fetch(self._remote.urls[shard], path, keep, None, entry.bytes)
                break
            except UserError as error:
                full = isinstance(error.__cause__, OSError)
                if not full or attempt == _MOST_ROOM_MADE or not self._evict(self._smaller(entry.bytes), keep=path):
                    raise
        return opened[-1]

    def _smaller(self, num_bytes: int) -> int:
        """Lowers the cache's limit, since its disk is full, to make room for another shard; returns the limit."""
        held = sum(size for _, size, _ in self._files())
        if held < self._max_bytes:
            note(
                f"warning: {self.directory}: the disk is full with {held / 1e9:.3g} GB in the cache; older shards are "
                "removed"
            )
        self._max_bytes = min(self._max_bytes, max(held - 2 * num_bytes, num_bytes))
        return self._max_bytes

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetches shards in the background, in this order."""
        if self._wanted is None:
            self._wanted = queue.SimpleQueue()
            for _ in range(_FETCHERS):
                threading.Thread(target=self._work, args=(self._wanted,), daemon=True).start()
        for shard in shards:
            self._wanted.put(shard)

    def _work(self, wanted: queue.SimpleQueue[int]) -> None:
        while True:
            with suppress(Exception):  # whoever reads the shard tries again, and reports
                self._open(wanted.get())

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of the shards that are there, oldest first."""
        found, names = list[tuple[int, int, Path]](), set(self._names)
        with suppress(OSError), os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name in names:  # with any ending: .tar, .tar.gz
                    with suppress(OSError):  # another process has just removed it
                        times = entry.stat(follow_symlinks=False)
                        found.append((times.st_atime_ns, times.st_size, Path(entry.path)))
        return sorted(found)

    def _evict(self, most: int, keep: Path) -> bool:
        """Removes shards until the cache holds `most` bytes; whether there was one to remove."""
        removed = False
        with locked(self.directory / "evict"):
            self._remove_torn()
            files = self._files()
            excess = sum(size for _, size, _ in files) - most
            for _, size, path in files:
                if excess <= 0:
                    break
                if path != keep:
                    with suppress(OSError):
                        path.unlink(missing_ok=True)
                        note_of(path).unlink(missing_ok=True)
                        excess -= size
                        removed = True
        return removed

    def _remove_torn(self) -> None:
        """Removes files that killed processes left unfinished, unless somebody is fetching that very shard."""
        known = {f".{name}.": name for name in self._names}
        for torn in self.directory.glob(".*.tmp"):
            owner = max((name for start, name in known.items() if torn.name.startswith(start)), key=len, default=None)
            if owner is None:
                continue
            with locked(self.directory / owner, wait=False) as held:
                if held:
                    torn.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Removes what killed processes left of this shard. The caller holds the lock."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        stale.unlink(missing_ok=True)


def _recent(failure: Path) -> str | None:
    """The message of a noted failure, if a process of this machine noted it since this one began, and not long ago.

    Times are the machine's monotonic clock, which its processes share: the time of a file comes from a file server, and
    the time of day may be set back.
    """
    with suppress(TypeError, ValueError, KeyError):
        content = read_note(failure)
        now, then = time.monotonic(), float(content["at"])
        if content["boot"] == _boot() and max(_BEGAN, now - _RETRY_AFTER_SECONDS) <= then <= now:
            return str(content["message"])
    return None


def _boot() -> str:
    """Identifies this machine since its last boot."""
    with suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return os.uname().nodename
