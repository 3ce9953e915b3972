"""Tars with headers of all kinds, by Python's tarfile and byte by byte."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.tar import list_members


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    """A member; with `size`, its header alone says that many bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data) if data else None)


def block(name: str, size: bytes = b"00000000000\0", kind: bytes = b"0", **fields: bytes) -> bytes:
    """One header as bytes. `fields`: magic, target, prefix."""
    content = bytearray(512)
    places = {"target": 157, "magic": 257, "prefix": 345}
    parts = [(0, name.encode()), (124, size), (156, kind)]
    for place, value in [*parts, *((places[field], value) for field, value in fields.items())]:
        content[place : place + len(value)] = value
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    return bytes(content)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(kind: bytes, *records: bytes) -> bytes:
    """An extended header; each record is `KEY=VALUE`."""
    lines = b""
    for record in records:
        length = len(record) + 3
        while len(b"%d %s\n" % (length, record)) != length:
            length += 1
        lines += b"%d %s\n" % (length, record)
    return block("pax", b"%011o\0" % len(lines), kind, magic=b"ustar\0") + padded(lines)


END = bytes(1024)


def listed(path: Path, content: bytes | None = None) -> tuple[list[tuple[str, bytes]], dict[str, int]]:
    """(name, data) of the files found in a tar, and how many were left out for each reason."""
    if content is not None:
        path.write_bytes(content)
    left_out, data = LeftOut(), path.read_bytes()
    members = list_members(path, left_out)
    return [(name, data[offset : offset + size]) for name, offset, size in members], left_out.counts
