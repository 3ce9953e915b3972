"""Single blocks of a tar: the headers of V7, ustar, GNU and PAX archives, and the records that a PAX header holds."""

from __future__ import annotations

import re
from typing import NamedTuple

BLOCK = 512
END = b"\0" * BLOCK
"""A block of zeros ends an archive."""

REGULAR = (b"0", b"\0", b"7")
LINKS = HARD_LINK, SYMBOLIC_LINK = b"1", b"2"
DEVICES = (b"3", b"4", b"6")
FOLDERS_AND_LABELS = (b"5", b"V", b"D")
"""Folders, the label of a GNU volume, and GNU's list of what lay in a folder: they hold no file."""
WITHOUT_DATA = (*LINKS, *DEVICES, *FOLDERS_AND_LABELS)
"""Members without data. Their headers may have a size nonetheless, such as the 4096 bytes of a folder on its disk."""
SPARSE, CONTINUED = b"S", b"M"
EXTENDED = PAX, PAX_OF_SOLARIS, PAX_GLOBAL, GNU_NAME, GNU_LINK = b"x", b"X", b"g", b"L", b"K"

_MOST_RECORDS = 1000
"""Most records of a PAX header; real ones have a dozen, and some attributes."""
_RECORD_LENGTH = re.compile(rb"([0-9]{1,18}) ")
_NAME, _SIZE, _CHECKSUM, _KIND = slice(0, 100), slice(124, 136), slice(148, 156), slice(156, 157)
_TARGET, _MAGIC, _PREFIX = slice(157, 257), slice(257, 263), slice(345, 500)


class Header(NamedTuple):
    """The content of one header block. Extended headers before it may override it."""

    name: str
    size: int
    kind: bytes
    """The type letter."""
    target: str
    """The target of a link."""


def is_header(block: bytes) -> bool:
    """Whether the block's checksum is that of a header. Some old archives summed signed bytes."""
    try:
        stored = _number(block[_CHECKSUM])
    except ValueError:
        return False
    computed = sum(block) - sum(block[_CHECKSUM]) + 8 * 32  # as if the checksum were blanks
    return stored == computed or stored == computed - 256 * sum(byte > 127 for byte in block)


def parse_header(block: bytes) -> Header:
    """Raises ValueError for a block that is no header, or whose size is no number from 0 up."""
    if not is_header(block):
        raise ValueError("bad checksum")
    name = text(block[_NAME])
    if block[_MAGIC] == b"ustar\0" and block[_PREFIX.start]:  # GNU and V7 headers have other things there
        name = f"{text(block[_PREFIX])}/{name}"
    kind = block[_KIND]
    return Header(name, _number(block[_SIZE]), kind, text(block[_TARGET]) if kind in LINKS else "")


def _number(field: bytes) -> int:
    """Octal digits, or base 256 where the first bit is set. An empty field is 0, as volume labels have it."""
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise ValueError("a negative number")
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    if not digits.isdigit() or b"8" in digits or b"9" in digits:  # int() takes -1 and 1_0
        raise ValueError(f"{digits!r} is no octal number")
    return int(digits, 8)


def text(field: bytes) -> str:
    """A name, up to the first zero byte; bytes that are not UTF-8 become surrogates."""
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def pax_records(data: bytes) -> dict[str, str]:
    """The `LENGTH KEY=VALUE newline` records of a PAX header. Raises ValueError where they are not that."""
    records, position, count = dict[str, str](), 0, 0
    while position < len(data) and data[position]:  # some writers fill up with zeros
        match = _RECORD_LENGTH.match(data, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise ValueError(f"byte {position} begins no record")
        if (count := count + 1) > _MOST_RECORDS:
            raise ValueError(f"it has more than {_MOST_RECORDS} records")
        key, _, value = data[match.end() : end - 1].partition(b"=")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position = end
    return records
