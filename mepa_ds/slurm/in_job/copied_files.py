"""The files of a set and of its copy on a node's disk: what is copied, and whether a copy is one."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mepa_ds import log
from mepa_ds.errors import UserError
from mepa_ds.files import sha256_of_file, write_json
from mepa_ds.safety.places import open_new, open_no_link
from mepa_ds.safety.reading import read_json_object

_CHUNK = 1 << 22
_SMALL = 1 << 26
"""Bytes up to which a file that the index has no SHA-256 of is compared with the set's own."""


def regular_files(source: Path) -> dict[str, int]:
    """Name -> bytes of the files of a set. Links are left out, with a note: who made the set may have had them lead
    anywhere. So are hidden files, directories, pipes and devices.

    Raises:
        UserError: the index is a link.
    """
    files, links = {}, []
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            links.append(entry.name)
        elif entry.is_file(follow_symlinks=False):
            files[entry.name] = entry.stat(follow_symlinks=False).st_size
    if "index.json" in links:
        raise UserError(_link(source / "index.json"))
    if links:
        log.note(f"{source}: {len(links)} links are not copied ({links[0]}{', ...' if len(links) > 1 else ''})")
    return files


def indexed_digests(index: Path) -> dict[str, str]:
    """Name -> SHA-256 of the shards, as far as the index has any.

    Raises:
        UserError: the index is no JSON object.
    """
    try:
        shards = read_json_object(index).get("shards")
    except (OSError, ValueError) as error:
        raise UserError(f"{index}: cannot be read: {error}; make the set again") from None
    entries = [entry for entry in shards if isinstance(entry, dict)] if isinstance(shards, list) else []
    return {
        entry["name"]: entry["sha256"]
        for entry in entries
        if isinstance(entry.get("name"), str) and isinstance(entry.get("sha256"), str) and entry["sha256"]
    }


def copy_files(
    source: Path, target: Path, files: Mapping[str, int], digests: Mapping[str, str], on_bytes: Callable[[int], object]
) -> dict[str, str]:
    """Copies the files into a directory of this user's, where only this user may read them, with their times.

    Returns:
        name -> SHA-256 of what was copied, for `write_record`.

    Raises:
        UserError: a file is not the one that the index describes, has become a link, or is a shard that is one.
    """
    if lost := [name for name in digests if name not in files and (source / name).is_symlink()]:
        raise UserError(_link(source / lost[0]))
    record = {}
    for name, size in files.items():
        record[name] = _copy(source / name, target / name, size, on_bytes)
        if digests.get(name, record[name]) != record[name]:
            raise UserError(
                f"{source / name}: is not the file that index.json describes (SHA-256); restore it or make the set "
                "again, or set MEPA_STAGE=off to train on it as it is"
            )
    return record


def write_record(copy: Path, record: Mapping[str, str]) -> None:
    """Notes, beside a copy, the SHA-256 of each of its files."""
    write_json(_record_of(copy), record)


def _record_of(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.copied.json")


def _copy(source: Path, target: Path, size: int, on_bytes: Callable[[int], object]) -> str:
    """Returns the SHA-256 of what was copied. A file that grows is copied as far as it was there at first."""
    try:
        descriptor = open_no_link(source, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EINVAL):
            raise
        raise UserError(_link(source)) from None
    digest, left = hashlib.sha256(), size
    with open(descriptor, "rb") as reader, open_new(target, 0o600) as writer:
        while left and (chunk := reader.read(min(_CHUNK, left))):
            digest.update(chunk)
            writer.write(chunk)
            on_bytes(len(chunk))
            left -= len(chunk)
        times = os.fstat(descriptor)
    os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))  # offset indices of foreign shards name the time
    return digest.hexdigest()


def difference(source: Path, copy: Path, files: Mapping[str, int], digests: Mapping[str, str]) -> str | None:
    """What tells a copy from its set, or None. Every byte of the copy is read, on all cores.

    A shard is compared with the SHA-256 in the set's index; a small file with the set's own; a large one that the index
    says nothing of with what was noted when it was copied.
    """
    folder = os.lstat(copy)
    if not stat.S_ISDIR(folder.st_mode) or folder.st_uid != os.geteuid():
        return "no directory of yours"
    found = {}
    for entry in os.scandir(copy):
        facts = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
            return f"{entry.name} is no file of yours"
        found[entry.name] = facts.st_size
    if found != files:
        name = min(name for name in found.keys() | files.keys() if found.get(name) != files.get(name))
        return f"{name} has {found.get(name, 'no')} bytes, not {files.get(name, 'none')}"
    try:
        noted = read_json_object(_record_of(copy))
    except (OSError, ValueError) as error:
        return f"{_record_of(copy)} cannot be read: {error}"

    def differs(name: str) -> bool:
        expected: str | None
        if name in digests:
            expected = digests[name]
        elif files[name] <= _SMALL:
            expected = sha256_of_file(source / name)
        else:
            if (source / name).stat().st_mtime_ns != (copy / name).stat().st_mtime_ns:
                return True
            expected = noted.get(name)
        return sha256_of_file(copy / name) != expected

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        changed = [name for name, is_other in zip(files, pool.map(differs, files), strict=True) if is_other]
    return f"{changed[0]} has other bytes" if changed else None


def _link(path: Path) -> str:
    return f"{path} is a link, and links are not copied; put the file itself there, or set MEPA_STAGE=off"
