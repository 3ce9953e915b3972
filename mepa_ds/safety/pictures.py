"""The one place that opens pictures: formats are a list, and no file makes the decoder use memory or time without end.

The limits are ours: Pillow's own is a setting that any library of the process may lift.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence

from PIL import (
    Image,
    TiffImagePlugin,  # noqa: F401  (of the formats below Pillow would import these two with all others it has)
    WebPImagePlugin,  # noqa: F401
)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are decoded, by Pillow's names. Its other plugins are never used: EPS starts another program."""
MOST_PIXELS = 1 << 26
"""8192 x 8192: decoded and converted, the worst kind of such an image takes about a gigabyte."""

_MOST_BLOCKS = 1000  # of a GIF before its picture; Pillow copies all earlier comments at each
_MOST_COPIED = 1 << 24  # bytes of fields beyond those that a file has; damaged fields point anywhere
_HARMLESS = 1 << 14  # bytes that hold too few fields to claim more than that
_EXIF = b"Exif\0\0"
_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
"""Bytes of a value, by TIFF's number of its type."""
_TILE_WIDTH, _TILE_LENGTH = 322, 323


class TooLargeError(ValueError):
    """The picture has more pixels than are read; or what describes it claims more bytes than it has."""


def open_image(data: bytes, formats: Sequence[str] = FORMATS) -> Image.Image:
    """The picture, whose pixels are not decoded yet.

    Raises:
        TooLargeError: it would take more memory than is meant to be had for one.
        Exception: whatever Pillow raises for bytes of other formats, and for damage.
    """
    if data[:4] == b"GIF8":
        _check_gif(data)
    elif data[:2] == b"\xff\xd8" and len(data) > _HARMLESS:
        _check_fields(b"".join(_exif_of_jpeg(data)))
    elif data[:2] in (b"II", b"MM"):
        _check_fields(data)
    image: Image.Image = Image.open(io.BytesIO(data), formats=tuple(formats))
    check_pixels(image.width, image.height)
    tags = getattr(image, "tag_v2", {})
    check_pixels(_number(tags.get(_TILE_WIDTH)), _number(tags.get(_TILE_LENGTH)), "its tiles have ")
    if image.width == 0 or image.height == 0:
        raise ValueError(f"it has {image.width} x {image.height} pixels")
    return image


def check_pixels(width: int, height: int, what: str = "") -> None:
    """Raises TooLargeError for more pixels than are read."""
    limit = min(MOST_PIXELS, Image.MAX_IMAGE_PIXELS or MOST_PIXELS)
    if width * height > limit:
        raise TooLargeError(f"{what}{width} x {height} pixels, more than {limit}")


def orientation(image: Image.Image) -> int:
    """As EXIF gives it: 1 to 8; 1 where nothing does, or where that is damaged, which makes no damaged image."""
    try:
        _check_fields((image.info.get("exif") or b"").removeprefix(_EXIF))
        return _number(image.getexif().get(274, 1))
    except Exception:  # Pillow raises a dozen kinds
        return 1


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _check_fields(data: bytes) -> None:
    """Of TIFF or EXIF: Pillow copies the bytes of every field of the first directory at once, and a thousand fields may
    each claim all the file. Raises TooLargeError for fields of far more bytes than there are."""
    if len(data) <= _HARMLESS:
        return
    try:
        order = {b"II": "<", b"MM": ">"}[data[:2]]
        is_big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
        entry, counter = (f"{order}HHQQ", f"{order}Q") if is_big else (f"{order}HHLL", f"{order}H")
        start = struct.unpack_from(f"{order}{'Q' if is_big else 'L'}", data, 8 if is_big else 4)[0]
        count = struct.unpack_from(counter, data, start)[0]
    except (KeyError, struct.error):  # no such data; Pillow says so
        return
    first, size = start + struct.calcsize(counter), struct.calcsize(entry)
    claimed = 0
    for place in range(first, min(first + count * size, len(data) - size + 1), size):
        _, kind, values, offset = struct.unpack_from(entry, data, place)
        claimed += min(values * _UNITS.get(kind, 0), max(len(data) - offset, 0))
        if claimed > len(data) + _MOST_COPIED:
            raise TooLargeError("its fields claim far more bytes than it has")


def _exif_of_jpeg(data: bytes) -> Iterator[bytes]:
    """What Pillow joins: all segments of EXIF before the picture."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xFF:  # fill bytes
            place += 1
            continue
        if marker == 0xDA:
            return
        if marker == 0xE1 and data[place + 4 : place + 10] == _EXIF:
            yield data[place + 10 : place + 2 + length]
        place += 2 + length


def _check_gif(data: bytes) -> None:
    """The picture may be larger than the screen that the file begins with, and Pillow may fill it as it opens it.

    Raises TooLargeError for too many pixels, or blocks before the picture.
    """
    place = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    check_pixels(*_pair(data, 6))
    for _ in range(_MOST_BLOCKS):
        kind = data[place : place + 1]
        if kind == b",":
            (left, top), (width, height) = _pair(data, place + 1), _pair(data, place + 5)
            check_pixels(left + width, top + height)
            return
        if kind != b"!":
            place += 1
            if not kind or kind == b";":
                return
            continue
        place += 2
        while place < len(data) and data[place]:
            place += 1 + data[place]
        place += 1
    raise TooLargeError(f"it has more than {_MOST_BLOCKS} blocks before its picture")


def _pair(data: bytes, place: int) -> tuple[int, int]:
    return int.from_bytes(data[place : place + 2], "little"), int.from_bytes(data[place + 2 : place + 4], "little")
