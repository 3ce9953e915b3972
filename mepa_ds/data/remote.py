"""Shards that lie elsewhere: whole tars fetched ahead, in the order of use, into a bounded local cache.

A remote set is a local directory with `index.json`, the tables of offsets and `remote.json`, which says where the
tars are; `data_tools/merge_index.py remote` and `scan` make one. Samples are then permuted within windows of shards
(mepa_ds.data.order), and the cache holds a few windows. Processes of one machine share it: a file lock for each
shard lets one of them fetch while the others wait.

URLs are what webdataset opens (`https://`, `gs://`, `hf://`, `pipe:COMMAND`...) and `s3://`, which the AWS command
line fetches. A `pipe:` URL is a shell command: use no remote.json that you would not run as a program.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import math
import os
import queue
import re
import shlex
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mepa_ds.config.base import Section, validate
from mepa_ds.data.index import ShardEntry
from mepa_ds.data.order import BatchTask, SampleOrder, WindowWatch
from mepa_ds.errors import DamagedError, UserError
from mepa_ds.files import atomic_path, naming_full_disks, write_json

REMOTE_NAME = "remote.json"
_ATTEMPTS = 3
_RETRY_AFTER_SECONDS = 300.0
_BEGAN = time.time()
_FETCHERS = 2
_CHUNK = 1 << 20


class RemoteShards(Section):
    """The content of `remote.json`."""

    urls: tuple[str, ...]
    """Where each shard of the index is, in the order of the index."""
    cache: str
    """Directory for fetched tars; variables such as $TMPDIR and $UID are expanded where it is used."""
    cache_gigabytes: Annotated[float, Field(gt=0)]
    """Older shards are removed when the cache holds more."""
    window: Annotated[int, Field(gt=0)]
    """Shards that samples are shuffled over."""

    @property
    def directory(self) -> str:
        """`cache`, expanded as far as variables are set here."""
        text = self.cache.replace("$TMPDIR", tempfile.gettempdir()).replace("$UID", str(os.getuid()))
        return os.path.expandvars(text)

    @classmethod
    def read(cls, directory: Path) -> RemoteShards | None:
        path = directory / REMOTE_NAME
        if not path.exists():
            return None
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}; run data_tools/merge_index.py again") from error
        return validate(cls, data, str(path))

    def write(self, directory: Path) -> None:
        with naming_full_disks(directory / REMOTE_NAME):
            write_json(directory / REMOTE_NAME, self.model_dump(mode="json"))


def is_remote(url: str) -> bool:
    """Whether this is a URL for webdataset's openers rather than a path."""
    return re.match(r"pipe:|[a-z0-9+]+://", url) is not None


def open_url(url: str) -> Any:
    """A stream of the bytes at a URL."""
    from webdataset import gopen

    if url.startswith("s3://"):
        url = f"pipe:aws s3 cp --only-show-errors {shlex.quote(url)} -"
    elif url.startswith(("http://", "https://")):  # webdataset's own has curl try 30 times, for minutes
        url = f"pipe:curl --connect-timeout 30 --retry 2 --retry-delay 2 -f -s -S -L {shlex.quote(url)}"
    return gopen(url, "rb")


def fetch(url: str, path: Path, sha256: str = "") -> Path:
    """Copies what is at a URL to `path`, unless it is there; atomic, tried three times.

    What another process has tried in vain since this one began is not tried again for some minutes: the ranks of a
    machine would do so one after the other.

    Raises:
        DamagedError: it cannot be fetched, or is not what `sha256` says.
        UserError: the disk is full, or the directory of `path` another user's.
    """
    failure = path.with_name(f".{path.name}.failed")
    with _lock(path):
        if path.exists():
            return path
        if (known := _recent(failure)) is not None:
            raise DamagedError(known)
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of killed processes: we have the lock
            stale.unlink()
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(2.0**attempt)
            try:
                with naming_full_disks(path), atomic_path(path) as temporary:
                    digest = _copy(url, temporary)
                    if sha256 and digest != sha256:
                        raise OSError("its SHA-256 differs from the index's")
                return path
            except UserError:
                raise
            except Exception as error:  # the openers raise whatever their transports do
                reason = error
        message = f"{url}: cannot be fetched: {reason}; check the address and the network, then try again"
        with suppress(OSError):
            failure.write_text(message)
    raise DamagedError(message)


def _recent(failure: Path) -> str | None:
    """What a failure's file says, if it is not of an earlier start, and not too old."""
    with suppress(OSError):
        if failure.stat().st_mtime >= max(_BEGAN, time.time() - _RETRY_AFTER_SECONDS):
            return failure.read_text()
    return None


def _copy(url: str, path: Path) -> str:
    digest = hashlib.sha256()
    with open_url(url) as stream, open(path, "wb") as file:
        while chunk := stream.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115
    except PermissionError as error:
        raise UserError(
            f"{path.parent}: cannot write there: {error.strerror}; give yourself the right, or another directory "
            f"(cache in {REMOTE_NAME})"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class ShardCache:
    """The local copies of a remote set's tars. Pickles; threads and processes may share the directory.

    Raises:
        UserError: the cache is too small for the windows it must hold: the last, the current and the next.
    """

    def __init__(self, remote: RemoteShards, entries: Sequence[ShardEntry], what: str):
        self._remote, self._entries = remote, entries
        self._max_bytes = round(remote.cache_gigabytes * 1e9)
        self.directory = _cache_directory(remote, entries, what)
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

    def path(self, shard: int) -> Path:
        """The local copy of a shard, fetched now if it is not there.

        What could not be fetched is not tried again for some minutes: who skips the samples of a shard that is gone
        (on_damaged="skip") does not wait for each of them.

        Raises:
            DamagedError: it cannot be fetched.
        """
        since, reason = self._failures.get(shard, (-math.inf, ""))
        if time.monotonic() - since < _RETRY_AFTER_SECONDS:
            raise DamagedError(reason)
        try:
            return self._fetched(shard)
        except DamagedError as error:
            self._failures[shard] = (time.monotonic(), str(error))
            raise

    def _fetched(self, shard: int) -> Path:
        entry = self._entries[shard]
        path = self.directory / entry.name
        if not path.exists():
            fetch(self._remote.urls[shard], path, entry.sha256)
            self._evict(keep=path)
        try:
            os.utime(path)  # the least recently used go first
        except FileNotFoundError:  # another process made room just now
            return self._fetched(shard)
        return path

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
            try:
                self._fetched(wanted.get())
            except (UserError, OSError):
                continue  # whoever reads the shard tries again, and reports

    def _evict(self, keep: Path) -> None:
        names = {entry.name for entry in self._entries}  # whatever they end in: .tar?download=true, .tar.gz
        with _lock(self.directory / "evict"):
            paths = [path for path in self.directory.iterdir() if path.name in names]
            files = sorted((path.stat().st_mtime_ns, path) for path in paths)
            excess = sum(path.stat().st_size for _, path in files) - self._max_bytes
            for _, path in files:
                if excess <= 0:
                    break
                if path != keep:
                    excess -= path.stat().st_size
                    path.unlink()


def _cache_directory(remote: RemoteShards, entries: Sequence[ShardEntry], what: str) -> Path:
    """Of this set's content alone: other sets, and older versions at the same URLs, have shards of the same names."""
    text = remote.directory
    if "$" in text:
        raise UserError(f"{what}: cache {remote.cache!r} in {REMOTE_NAME} has a variable that is not set here")
    content = "\n".join([*remote.urls, *(entry.sha256 for entry in entries)])
    return Path(text).expanduser() / hashlib.sha256(content.encode()).hexdigest()[:12]


def fetched_ahead(tasks: Iterator[BatchTask], order: SampleOrder, caches: Sequence[ShardCache]) -> Iterator[BatchTask]:
    """Passes tasks on; tells the caches when the stream comes to another window of shards."""
    watch = WindowWatch(order)
    for task in tasks:
        if caches and (shards := watch.needed(int(task.positions[-1]))) is not None:
            for cache in caches:
                cache.prefetch(shards)
        yield task
