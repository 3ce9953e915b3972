"""JSON and NumPy archives from anybody: their size is bounded, and whatever is wrong with them is a ValueError.

Callers turn these into their own messages, with the file and the remedy.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_JSON_BYTES = 1 << 25
"""32 MiB: the index of 100 000 shards. Parsed, the worst text takes 24 times as much memory."""
MOST_ARCHIVE_BYTES = 1 << 29
"""512 MiB of arrays of one archive, unpacked: offset indices have less than 100 bytes a sample."""
MOST_LINE_BYTES = 1 << 24
"""Of a line of JSON: one of the routing of a large model has a million."""
_MOST_HEADER = 1 << 16
_MOST_DEPTH = 100
_MOST_ROWS = 1 << 40
"""Of an array without a value."""
_MOST_INT = 10**300
_MUCH_TOO_LONG = "it holds a number that is beyond all floating-point numbers"
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_MOST_DIMENSIONS = 32


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError for what is no JSON, for NaN, infinities (1e999 too) and whole numbers beyond all floats, for
    half characters, which no file can take, and for what is nested without end."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse_constant)
        if _HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeError as error:
        raise ValueError(f"it is no UTF-8 text ({error})") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise ValueError(_MUCH_TOO_LONG if "integer string conversion" in str(error) else str(error)) from None
    _check_values(value)
    return value


_DECODER = json.JSONDecoder(parse_constant=lambda name: _refuse_constant(name))
_BEYOND_FLOATS = re.compile(rb"[eE]\+?0*[1-9]\d\d|\d{300}")


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object in a line of JSON; None for anything else, as for one that `parse_json` would refuse. As quick as
    json.loads: a run has millions of lines."""
    try:
        value = parse_json(line) if _BEYOND_FLOATS.search(line) else _DECODER.decode(line.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def bounded_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the lines of a file; one that is longer than `MOST_LINE_BYTES` in pieces, which are no JSON."""
    return iter(lambda: file.readline(MOST_LINE_BYTES), b"")


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """The JSON in a regular file. Raises OSError for a file that cannot be read, ValueError for one that is no JSON or
    too large."""
    from mepa_ds.files import read_file

    return parse_json(read_file(path, most_bytes))


def read_json_object(path: Path, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """`read_json` of a file that must hold an object."""
    value = read_json(path, most_bytes)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {_kind(value)}, not an object {{...}}")
    return value


def read_archive(
    file: IO[bytes] | bytes, names: Collection[str] | None = None, most_bytes: int = MOST_ARCHIVE_BYTES
) -> dict[str, NDArray[Any]]:
    """Arrays of an `.npz`, without pickles. What a member unpacks to is bounded before it is unpacked.

    Args:
        names: which to read, all of which must be there; all by default.

    Raises:
        ValueError: it is no such archive, lacks a name, is damaged, or is larger than `most_bytes`.
    """
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with zipfile.ZipFile(source) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = list(members) if names is None else list(names)
            if missing := [name for name in wanted if name not in members]:
                raise ValueError(f"it has no array {missing[0]!r}")
            if (total := sum(members[name].file_size for name in wanted)) > most_bytes:
                raise ValueError(f"its arrays have {total} bytes, more than the {most_bytes} that are read")
            return {name: _read_member(archive, members[name]) for name in wanted}
    except ValueError:
        raise
    except MemoryError:
        raise ValueError("it needs more memory than there is") from None
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds for bytes that changed; CRCs are checked
        raise ValueError(str(error) or type(error).__name__) from None


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(info) as member:
        data = member.read(info.file_size + 1)  # a member that unpacks to more than it says ends here
    if len(data) != info.file_size:
        raise ValueError(f"its member {info.filename!r} has not the size that it says")
    return parse_array(data)


class ArrayHeader(NamedTuple):
    """What an `.npy` file says of its array."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[Any]
    start: int
    """Where the values begin."""


def array_header(data: bytes) -> ArrayHeader:
    """The header of an `.npy` file. Raises ValueError for anything else, and for objects, which are pickles."""
    try:
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(stream, max_header_size=_MOST_HEADER)
    except Exception as error:  # of a parser of Python's literals, and of all that builds types
        raise ValueError(f"it is no NumPy array: {str(error) or type(error).__name__}") from None
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    if any(length < 0 for length in shape) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"its shape {shape[:_MOST_DIMENSIONS]} is none")
    return ArrayHeader(shape, is_fortran, dtype, stream.tell())


def parse_array(data: bytes) -> NDArray[Any]:
    """The array of an `.npy` file, read-only. Raises ValueError for anything else, pickles among it."""
    stream = io.BytesIO(data)
    shape, is_fortran, dtype = _array_header(stream)
    count = _check_extent(shape, dtype, len(data) - stream.tell())
    values = np.frombuffer(data, dtype, count, stream.tell()) if count and dtype.itemsize else np.empty(shape, dtype)
    return values.reshape(shape, order="F" if is_fortran else "C")


def _array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(stream, max_header_size=_MOST_HEADER)
    except Exception as error:  # of a literal of Python's with anything in it: a dozen kinds
        raise ValueError(f"it is no NumPy array: {str(error) or type(error).__name__}") from None


def _check_extent(shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> int:
    """The count of values in the `size` bytes behind a header. Raises ValueError if they are not that many."""
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    count = math.prod(shape)
    if any(length < 0 for length in shape) or count * dtype.itemsize != size or (not count and max(shape) > _MOST_ROWS):
        raise ValueError(f"its shape {str(shape)[:100]} does not fit its {size} bytes")
    return count


def check_array_file(path: Path) -> None:
    """Raises ValueError for an .npy file whose header says more or less than the file has, and for one of objects:
    NumPy takes the memory first. OSError: it cannot be read. What is no .npy file passes."""
    from mepa_ds.files import check_regular

    check_regular(path)
    with open(path, "rb") as file:
        if file.read(6) != b"\x93NUMPY":
            return
        file.seek(0)
        shape, _, dtype = _array_header(file)
        _check_extent(shape, dtype, path.stat().st_size - file.tell())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON")


def _check_values(value: Any) -> None:
    level = [value]
    for _ in range(_MOST_DEPTH):
        inner: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is dict:
                inner.extend(item.values())
            elif kind is list:
                inner.extend(item)
            elif (kind is int and not -_MOST_INT < item < _MOST_INT) or (kind is float and math.isinf(item)):
                raise ValueError(_MUCH_TOO_LONG)
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested more than {_MOST_DEPTH} deep")


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
