"""Where a cache lies, and what is noted there: in a directory of this user alone, whoever owns the one around it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mepa_ds.config.paths import given_path
from mepa_ds.data.remote.remote_file import REMOTE_NAME, RemoteShards
from mepa_ds.data.shards.index import ShardEntry
from mepa_ds.errors import UserError
from mepa_ds.safety.places import is_own_file, open_anew, open_no_link, private_directory
from mepa_ds.safety.reading import parse_json

_MOST_NOTE_BYTES = 1 << 16
_CHUNK = 1 << 20


def cache_directory(remote: RemoteShards, entries: Sequence[ShardEntry], what: str) -> Path:
    """The directory of this user and this set's content alone: other sets and older versions have shards of the same
    names, and users who give one place (a group's disk) do not share files.

    Raises:
        UserError: the place has a variable that is not set here.
    """
    text = remote.directory
    if "$" in text:
        raise UserError(f"{what}: cache {remote.cache!r} in {REMOTE_NAME} has a variable that is not set here")
    content = "\n".join([*remote.places, *(entry.sha256 for entry in entries)])
    digest = hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:12]
    return given_path(text, f"{what}: cache in {REMOTE_NAME}") / f"{digest}-{os.geteuid()}"


def make_private(directory: Path, remote: RemoteShards, what: str) -> None:
    """Makes the directory of a cache, if it is not there.

    Raises:
        UserError: nothing can be written there, or something else is there: another user's directory, or a link. In
            a place where anybody may put things, such as /tmp, this holds for the directory around it too.
    """
    try:
        if remote.cache.startswith("$TMPDIR/") or _anybody_writes(directory.parent.parent):
            private_directory(directory.parent, what)
        elif directory.parent.is_symlink() and os.lstat(directory.parent).st_uid not in (0, os.geteuid()):
            raise UserError(f"{what}: {directory.parent} is a link of another user; remove it, or give another place")
        private_directory(directory, what)
    except OSError as error:
        raise UserError(
            f"{directory}: cannot write there: {error.strerror}; get the right to write there, or give another "
            f"directory (cache in {REMOTE_NAME})"
        ) from error


def _anybody_writes(directory: Path) -> bool:
    try:
        return bool(directory.stat().st_mode & stat.S_IWOTH)
    except FileNotFoundError:  # it is made now, by this user
        return False


def note_of(shard: Path) -> Path:
    """The note that a shard in the cache has been verified."""
    return shard.with_name(f".{shard.name}.verified")


def note_verified(shard: Path, descriptor: int, sha256: str) -> None:
    """Notes that a file has this SHA-256, so that other processes need not compute it."""
    write_note(note_of(shard), _facts(descriptor, sha256))


def is_noted(shard: Path, descriptor: int, sha256: str) -> bool:
    """Whether a process of this user has computed this SHA-256 of the file as it is."""
    with suppress(ValueError):
        return bool(read_note(note_of(shard)) == _facts(descriptor, sha256))
    return False


def _facts(descriptor: int, sha256: str) -> dict[str, Any]:
    found = os.fstat(descriptor)
    return {"inode": found.st_ino, "bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": sha256}


def sha256_of(descriptor: int) -> str:
    """Hex digest of an open file; its position stays."""
    digest, position = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, _CHUNK, position):
        digest.update(chunk)
        position += len(chunk)
    return digest.hexdigest()


def write_note(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a note in a private directory, for this user alone. A note that cannot be written is left out."""
    with suppress(OSError), open_anew(path, 0o600) as file:
        file.write(json.dumps(content).encode())


def read_note(path: Path) -> Any:
    """What `write_note` wrote. Raises ValueError where there is no note of this user."""
    try:
        with open(open_no_link(path, os.O_RDONLY), "rb") as file:
            if not is_own_file(file.fileno()):
                raise ValueError("it is another user's")
            return parse_json(file.read(_MOST_NOTE_BYTES))
    except OSError as error:
        raise ValueError(str(error)) from None
