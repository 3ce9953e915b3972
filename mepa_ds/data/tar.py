"""Tar archives by offset: where every sample's members lie, found by stepping from header to header.

Reads ustar, PAX and GNU headers (WebDataset shards of any writer); writes ustar, with a PAX header before names
that ustar cannot hold. A sample is a run of members `KEY.EXT` with the same key, as WebDataset defines it: the
key ends at the first dot of the file name.

Legend: N samples of a shard, M member extensions.
"""

from __future__ import annotations

import mmap
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mepa_ds.errors import DamagedError

BLOCK = 512
LABEL_EXTENSION = "cls"
_LABEL_DIGITS = 18
_END = b"\0" * BLOCK
_REGULAR, _PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK = (b"0", b"\0", b"7"), b"x", b"g", b"L", b"K"


_ANEW = "make the shard again, or a set of it by data_tools/build_shards.py webdataset"


@dataclass(frozen=True)
class SampleTable:
    """Where the samples of one shard lie."""

    keys_N: NDArray[np.bytes_]
    extensions: tuple[str, ...]
    offsets_NM: NDArray[np.int64]
    """Byte offset of each member's data in the tar."""
    sizes_NM: NDArray[np.int64]
    """Bytes of each member; -1 where a sample has no such member."""
    labels_N: NDArray[np.int64] | None = None
    """What the `cls` members say, so that they need not be read; None when they have not been looked at."""
    ignored: tuple[str, ...] = ()
    """Names of members that belong to no sample; only after a scan."""

    def __len__(self) -> int:
        return len(self.keys_N)

    def key(self, row: int) -> str:
        return bytes(self.keys_N[row]).decode()

    @classmethod
    def of(cls, samples: list[tuple[str, dict[str, tuple[int, int]]]]) -> SampleTable:
        """From (key, {extension: (offset, size)}) in order."""
        extensions = tuple(dict.fromkeys(extension for _, members in samples for extension in members))
        places = np.array(
            [[members.get(extension, (0, -1)) for extension in extensions] for _, members in samples], np.int64
        ).reshape(len(samples), len(extensions), 2)
        keys = np.array([key.encode() for key, _ in samples], dtype=np.bytes_)
        return cls(keys, extensions, places[..., 0].copy(), places[..., 1].copy())


def label_number(data: bytes) -> int | None:
    """The number in a `cls` member; None for anything else, and for what int64 does not hold."""
    text = data.strip()
    return int(text) if text.isdigit() and len(text) <= _LABEL_DIGITS else None


def split_member_name(name: str) -> tuple[str, str]:
    """`a/b/n0.x.jpg` -> (`a/b/n0`, `x.jpg`); the extension is lower case. No dot: the extension is empty."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def printable(name: str) -> str:
    """A file name that may hold bytes that are not UTF-8 (as surrogates), as text that can be stored and printed."""
    return name.encode("utf-8", "backslashreplace").decode()


def few(names: Sequence[str], most: int = 5) -> str:
    """The first of many names, for a message."""
    return ", ".join(printable(name) for name in names[:most]) + (", ..." if len(names) > most else "")


def check_member_name(name: str, where: str) -> None:
    """Refuses names that would leave the directory a tar is unpacked in."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or not name:
        raise DamagedError(f"{where}: member {name!r} has an unsafe path; make the shard again without it")


def iterate_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, data offset, size) of each regular file in a tar, in order, without reading the data.

    Raises:
        DamagedError: the file is truncated, not a tar, compressed, sparse, or holds an unsafe name.
    """
    with open(path, "rb") as file:
        if path.stat().st_size == 0:
            raise DamagedError(f"{path}: the file is empty, not a tar")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from _step(data, 0, len(data), str(path))


def iterate_sample_members(path: Path, ignored: list[str]) -> Iterator[tuple[str, str, str, int, int]]:
    """(key, extension, name, data offset, size) of the members that belong to samples.

    The names of others go into `ignored`, as webdataset leaves them out: a README, or the `._0.jpg` that macOS packs
    beside `0.jpg`.
    """
    for name, offset, size in iterate_members(path):
        key, extension = split_member_name(name)
        if key and not key.endswith("/") and extension:
            yield key, extension, name, offset, size
        else:
            ignored.append(name)


def iterate_members_within(path: Path, start: int, size: int) -> Iterator[tuple[str, int, int]]:
    """Like `iterate_members`, for a tar that is itself a member of the uncompressed tar `path`."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield from _step(data, start, start + size, str(path))


def _step(data: mmap.mmap, position: int, end: int, where: str) -> Iterator[tuple[str, int, int]]:
    long_name: str | None = None
    long_size: int | None = None
    while position + BLOCK <= end:
        header = data[position : position + BLOCK]
        if header == _END:
            return
        name, size, kind = _parse_header(header, where, position)
        if kind in _REGULAR and long_size is not None:
            size = long_size
        start = position + BLOCK
        position = start + (size + BLOCK - 1) // BLOCK * BLOCK
        if start + size > end:
            raise DamagedError(f"{where}: truncated inside member {long_name or name!r}; copy or make it again")
        if kind == _GNU_NAME:
            long_name = data[start : start + size].rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind == _PAX:
            records = _pax_records(data[start : start + size], where)
            long_name = records.get("path", long_name)
            long_size = int(records["size"]) if "size" in records else None
        elif kind in _REGULAR:
            name = long_name or name
            long_name = long_size = None
            check_member_name(name, where)
            yield name, start, size
        elif kind not in (_PAX_GLOBAL, _GNU_LINK):
            if kind == b"S":
                raise DamagedError(f"{where}: member {name!r} is a sparse file; write the shard without sparse files")
            long_name = long_size = None  # a directory or a link: holds no data
    raise DamagedError(f"{where}: truncated, the end-of-archive mark is missing; copy or make it again")


def _parse_header(header: bytes, where: str, position: int) -> tuple[str, int, bytes]:
    try:
        if not _checksum_holds(header):
            raise ValueError("bad checksum")
        size = int.from_bytes(header[125:136], "big") if header[124] & 0x80 else int(header[124:136].strip(b"\0 "), 8)
    except ValueError as error:
        hint = "is it compressed?" if position == 0 else "copy or make the shard again"
        raise DamagedError(f"{where}: no tar header at byte {position}; {hint}") from error
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape"), size, header[156:157]


def _checksum_holds(header: bytes) -> bool:
    stored = int(header[148:156].strip(b"\0 "), 8)
    return stored == sum(header) - sum(header[148:156]) + 8 * 32


def _pax_records(data: bytes, where: str) -> dict[str, str]:
    """`LENGTH KEY=VALUE newline` records of a PAX header."""
    records = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            raise DamagedError(f"{where}: broken PAX header; copy or make the shard again")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return records


def scan_tar(path: Path) -> SampleTable:
    """The sample table of a tar that has none stored: WebDataset shards that others made."""
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    seen, ignored = set[str](), list[str]()
    for key, extension, name, offset, size in iterate_sample_members(path, ignored):
        if (shown := printable(name)) != name:
            raise DamagedError(f"{path}: the name of member {shown!r} is not UTF-8; {_ANEW}")
        if not samples or samples[-1][0] != key:
            if key in seen:
                raise DamagedError(f"{path}: the members of sample {key!r} do not lie side by side; {_ANEW}")
            seen.add(key)
            samples.append((key, {}))
        if extension in samples[-1][1]:
            raise DamagedError(f"{path}: sample {key!r} has two members .{extension}; make the shard again")
        samples[-1][1][extension] = (offset, size)
    return replace(SampleTable.of(samples), ignored=tuple(ignored))


def member_header(name: str, size: int) -> bytes:
    """Header blocks of a regular file with fixed owner, mode and time, so that equal content gives equal bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o444, 0
    return info.tobuf(tarfile.PAX_FORMAT)
