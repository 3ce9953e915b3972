"""Tar archives by offset: where every file's data lie, found by stepping from header to header.

Reads V7, ustar, PAX and GNU headers, and archives that were joined by `cat`; writes ustar, with a PAX header before
names that ustar cannot hold. A link is read from the member it points at. Whatever is not read is refused or counted.
"""

from __future__ import annotations

import errno
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mepa_ds.data.shards import tar_headers as headers
from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.tar_headers import BLOCK, END, Header
from mepa_ds.errors import DamagedError
from mepa_ds.files import again
from mepa_ds.safety.text import printable

DEAD_LINKS = "links to what is not in the tar"
DEVICES = "devices and pipes"
UNKNOWN_KINDS = "members of unknown types"
BEHIND_THE_END = "pieces of data behind the end of the archive"

_MOST_EXTENDED_BYTES = 1 << 20
"""Largest size of one extended header: a larger one is damage and would fill the memory."""
_MOST_EXTENDED = 16
"""Most extended headers of one member: real ones have a PAX header, or a long name and a long link."""
_MOST_NAME_BYTES = 4096
"""The kernel's limit of a path: names are what is kept of a tar."""
_MOST_LINKS = 40
"""The kernel's limit: a longer chain of links leads in a circle."""
_CHUNK = 1 << 20
_SPARSE_RECORDS = ("GNU.sparse.", "SCHILY.realsize", "SUN.holesdata")
_AGAIN = "copy or make it again"

_NAMES = ("path", "linkpath", "GNU.sparse.name")
_READ = (*_NAMES, "size")
"""Records that are looked at; others (times, owners, attributes) are not kept."""

Read = Callable[[int, int], bytes]
"""(number of bytes, position) -> bytes."""


class TarMember(NamedTuple):
    """A file in a tar, or a link to one, which then has its target's place."""

    name: str
    offset: int
    """Where its data begin, in bytes from the start of the tar file."""
    size: int


class _Entry(NamedTuple):
    """A member as its headers describe it."""

    name: str
    offset: int
    size: int
    kind: bytes
    target: str


def list_members(path: Path, left_out: LeftOut, start: int = 0, size: int | None = None) -> list[TarMember]:
    """The files of a tar in its order, without reading their data; links in their own place.

    Args:
        left_out: collects members that are no files of this tar (dead links, devices, unknown types), and data behind
            the end.
        start: where the tar begins, if it is itself a member of the uncompressed tar `path`.
        size: of the tar in bytes; to the end of the file by default.

    Raises:
        DamagedError: the file is truncated, not a tar, compressed, cannot be read, or holds an unsafe name, a sparse
            file or the rest of one from another volume.
    """
    try:
        entries, others = again(lambda: _entries(path, start, size))
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror or error}; {_AGAIN}") from error
    left_out.update(others)
    return _files(entries, left_out)


def _entries(path: Path, start: int, size: int | None) -> tuple[list[_Entry], LeftOut]:
    left_out = LeftOut()
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size if size is None else start + size
        if end == start:
            raise DamagedError(f"{path}: the file is empty, not a tar")
        read = partial(_read, file.fileno(), str(path))
        return list(_step(read, partial(_next_data, file.fileno()), start, end, left_out, str(path))), left_out


def _read(descriptor: int, where: str, size: int, position: int) -> bytes:
    data = os.pread(descriptor, size, position)
    if len(data) < size:  # the file is being written
        raise DamagedError(f"{where}: became shorter while it was read; {_AGAIN}")
    return data


def _next_data(descriptor: int, position: int, end: int) -> int:
    """The first position from here on that is in no hole: a file of a few bytes on its disk may say that it has tera-
    bytes, and zeros in holes take as long to read as others."""
    try:
        return min(os.lseek(descriptor, position, os.SEEK_DATA), end)
    except OSError as error:  # ENXIO: holes up to the end
        return end if error.errno == errno.ENXIO else position


def check_member_name(name: str, where: str) -> None:
    """Refuses names that would leave the directory a tar is unpacked in."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or not name:
        raise DamagedError(f"{where}: member {name!r} has an unsafe path; make the shard again without it")


def _step(
    read: Read, next_data: Callable[[int, int], int], start: int, end: int, left_out: LeftOut, where: str
) -> Iterator[_Entry]:
    """All members except folders and labels. Records of extended headers are kept for the member that they describe."""
    position, is_over = start, False
    common, own, extended = dict[str, str](), dict[str, str](), 0
    while position + BLOCK <= end:
        block = read(BLOCK, position)
        if block == END:
            if own:
                raise DamagedError(f"{where}: an extended header at the end has no member; {_AGAIN}")
            position = _behind_zeros(read, next_data, position, start, end)
            is_over, common, extended = True, {}, 0
            continue
        if is_over and not headers.is_header(block):
            break
        is_over = False
        header = _parse(block, where, position, position == start)
        data = position + BLOCK
        if header.kind in headers.EXTENDED:
            if (extended := extended + 1) > _MOST_EXTENDED:
                raise DamagedError(f"{where}: {extended} extended headers before one member; {_AGAIN}")
            _take_extended(header, read, data, end, where, common, own)
            size = header.size
        else:
            entry = _member(header, {**common, **own} if common or own else own, read, data, end, where)
            own, size, extended = {}, entry.size, 0
            if entry.kind not in headers.FOLDERS_AND_LABELS:
                check_member_name(entry.name, where)
                yield entry
        position = data + (size + BLOCK - 1) // BLOCK * BLOCK
    if not is_over:
        raise DamagedError(f"{where}: truncated, the end-of-archive mark is missing; {_AGAIN}")
    if position < end:
        left_out.add(BEHIND_THE_END, f"{end - position} bytes at the end of {where}")


def _behind_zeros(read: Read, next_data: Callable[[int, int], int], position: int, start: int, end: int) -> int:
    """The first block, counted from `start`, that holds another byte; `end` if there is none."""
    while (position := next_data(position, end)) < end:
        chunk = read(min(_CHUNK, end - position), position)
        if rest := chunk.lstrip(b"\0"):
            found = position + len(chunk) - len(rest)
            return found - (found - start) % BLOCK
        position += len(chunk)
    return end


def _parse(block: bytes, where: str, position: int, is_first: bool) -> Header:
    try:
        return headers.parse_header(block)
    except ValueError as error:
        hint = "is it compressed?" if is_first else "copy or make the shard again"
        raise DamagedError(f"{where}: no tar header at byte {position}: {error}; {hint}") from error


def _take_extended(
    header: Header, read: Read, data: int, end: int, where: str, common: dict[str, str], own: dict[str, str]
) -> None:
    """Adds the records of an extended header to those of all following members, or to those of the next one."""
    if header.size > min(end - data, _MOST_EXTENDED_BYTES):
        raise DamagedError(f"{where}: an extended header at byte {data - BLOCK} is cut short or damaged; {_AGAIN}")
    if header.size > _MOST_NAME_BYTES and header.kind in (headers.GNU_NAME, headers.GNU_LINK):
        raise DamagedError(f"{where}: a name of {header.size} bytes at byte {data - BLOCK}; no file system has such")
    content = read(header.size, data)
    if header.kind in (headers.GNU_NAME, headers.GNU_LINK):
        # Where a member has both kinds of long name, PAX's counts, as it does for GNU tar.
        own.setdefault("path" if header.kind == headers.GNU_NAME else "linkpath", headers.text(content))
        return
    try:
        records = headers.pax_records(content)
    except ValueError as error:
        raise DamagedError(f"{where}: broken PAX header at byte {data - BLOCK}: {error}; {_AGAIN}") from error
    if max(len(records.get(key, "")) for key in _NAMES) > _MOST_NAME_BYTES:
        raise DamagedError(f"{where}: a name in the PAX header at byte {data - BLOCK} is too long; {_AGAIN}")
    kept = {key: value for key, value in records.items() if key in _READ or key.startswith(_SPARSE_RECORDS)}
    if header.kind == headers.PAX_GLOBAL:
        common.update(kept)
        for key in [key for key in common if key.startswith(_SPARSE_RECORDS) and not common[key]]:
            del common[key]  # cancelled; others refuse the next member, so that their number is bounded
    else:
        own.update(kept)


def _member(header: Header, records: dict[str, str], read: Read, data: int, end: int, where: str) -> _Entry:
    """A member by its header and the extended headers before it, with the size of the data that really follow.

    An empty record cancels the record of that name in a header for all members.
    """
    name, kind = records.get("path") or header.name, header.kind
    if kind == headers.SPARSE or any(key.startswith(_SPARSE_RECORDS) and records[key] for key in records):
        name = records.get("GNU.sparse.name") or name
        raise DamagedError(
            f"{where}: member {printable(name)!r} is stored as a sparse file, whose bytes do not lie in one piece; "
            "unpack the tar and pack it again without --sparse (bsdtar: with --no-read-sparse)"
        )
    if kind == headers.CONTINUED:
        raise DamagedError(
            f"{where}: member {printable(name)!r} goes on from another volume of the tar; unpack all volumes with tar "
            "--multi-volume and pack them as one"
        )
    size = header.size
    if value := records.get("size"):
        if not value.isascii() or not value.isdigit() or len(value) > 18:
            raise DamagedError(f"{where}: broken PAX header: member {printable(name)!r} has size {value!r}; {_AGAIN}")
        size = int(value)
    if kind in headers.REGULAR and name.endswith("/"):  # how V7 wrote folders
        kind = headers.FOLDERS_AND_LABELS[0]
    if kind in headers.WITHOUT_DATA and not _has_data(read, data, size, end):
        size = 0
    if size > end - data:
        raise DamagedError(f"{where}: truncated inside member {printable(name)!r}; {_AGAIN}")
    if kind == headers.HARD_LINK and size:  # PAX allows the file's own data behind a hard link
        kind = headers.REGULAR[0]
    return _Entry(name, data, size, kind, records.get("linkpath") or header.target)


def _has_data(read: Read, data: int, size: int, end: int) -> bool:
    """Whether data follow the header of a folder or link that has a size, and not the next header at once."""
    if size == 0:
        return False
    block = read(min(BLOCK, end - data), data)
    return block not in (b"", END) and not headers.is_header(block)


def _files(entries: list[_Entry], left_out: LeftOut) -> list[TarMember]:
    """The files among the members, and the links to them."""
    places = dict[str, tuple[int, int]]()  # the last of each name, as unpacking would leave it
    links = dict[str, str]()
    found: list[tuple[_Entry, tuple[int, int] | str]] = []  # a place, or the name that a link waits for
    has_links = any(entry.kind in headers.LINKS for entry in entries)
    for entry in entries:
        place: tuple[int, int] | str = (entry.offset, entry.size)
        if entry.kind in headers.LINKS:
            name, place = posixpath.normpath(entry.name), _target(entry)
            if entry.kind == headers.HARD_LINK and name == place and name in places:
                continue  # one file, named twice when the tar was made
            if entry.kind == headers.HARD_LINK:
                place = places.get(place, place)
        elif entry.kind in headers.DEVICES:
            left_out.add(DEVICES, entry.name)
            continue
        elif entry.kind not in headers.REGULAR:
            left_out.add(UNKNOWN_KINDS, f"{entry.name} of type {entry.kind.decode('latin-1')!r}")
            continue
        if has_links:
            _note(posixpath.normpath(entry.name), place, places, links)
        found.append((entry, place))
    members = []
    for entry, place in found:
        end = _followed(place, places, links) if isinstance(place, str) else place
        if end is None:
            left_out.add(DEAD_LINKS, f"{entry.name} -> {entry.target}")
        else:
            members.append(TarMember(entry.name, *end))
    return members


def _target(link: _Entry) -> str:
    """The name of a link's target. A symbolic link's target is relative to the link's own folder."""
    folder = posixpath.dirname(link.name) if link.kind == headers.SYMBOLIC_LINK else ""
    return posixpath.normpath(posixpath.join(folder, link.target))


def _note(name: str, place: tuple[int, int] | str, places: dict[str, tuple[int, int]], links: dict[str, str]) -> None:
    """Notes what a name stands for: a later member replaces an earlier one of the same name."""
    if isinstance(place, str):
        links[name] = place
        places.pop(name, None)
    else:
        places[name] = place
        links.pop(name, None)


def _followed(name: str, places: dict[str, tuple[int, int]], links: dict[str, str]) -> tuple[int, int] | None:
    for _ in range(_MOST_LINKS):
        if name in places or name not in links:
            break
        name = links[name]
    return places.get(name)


def member_header(name: str, size: int) -> bytes:
    """Header blocks of a regular file with fixed owner, mode and time, so that equal content gives equal bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o444, 0
    return info.tobuf(tarfile.PAX_FORMAT)
