"""DCP's table of contents of a checkpoint, `.metadata`: a pickle, of which nothing is ever called.

A checkpoint may come from a stranger. The pickle is taken apart by a machine that knows the few instructions and names
of such a table, and makes plain records of it. What they say is checked against the files before DCP's classes are
made: sizes, places in files, and that no byte is read twice, so that reading takes no more memory than there are files.
"""

from __future__ import annotations

import functools
import io
import math
import os
import pickle
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mepa_ds.errors import UserError
from mepa_ds.files import read_file
from mepa_ds.safety.text import printable

TABLE_NAME = ".metadata"
_MOST_BYTES = 1 << 28
_MOST_DIMENSIONS = 8
_FRAGMENT_FILE = re.compile(r"__[0-9]{1,9}_[0-9]{1,9}\.distcp")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_NAMES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "pathlib._local": {"PosixPath"},
}  # fmt: skip


@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names."""

    text: str


@dataclass(eq=False)  # keys of dictionaries, as cheap to hash as to compare
class _Made:
    """What the pickle would make: of what, from what arguments, with what state."""

    kind: str
    arguments: Any
    state: Any = None


_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE "
    "TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL NEWOBJ "
    "REDUCE BUILD MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET"
)


class _Reader(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Python's own unpickler in Python (the one in C lets a file of ten bytes take 16 GB), with other instructions."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]]  # type: ignore[attr-defined]
        for code in (getattr(pickle, name) for name in _INSTRUCTIONS.split())
    }

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes):
        stream = io.BytesIO(data)
        super().__init__(stream)
        self.read, self.readline, self.proto = stream.read, stream.readline, 0
        self.stack, self.metastack = [], list[Any]()
        self.append = self.stack.append

    def load(self) -> Any:
        """As the original, but for frames: all of the file is in memory."""
        read, dispatch = self.read, self.dispatch
        try:
            while code := read(1):
                dispatch[code[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value
        raise pickle.UnpicklingError("it ends too early")

    def _frame(self) -> None:
        self.read(8)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if name in _NAMES.get(module, ()):
            return _Name(name)
        raise pickle.UnpicklingError(f"{printable(module)}.{printable(name)} does not belong into a checkpoint")

    def _make(self) -> None:
        arguments = self.stack.pop()
        if not isinstance(self.stack[-1], _Name):
            raise pickle.UnpicklingError("something is called that is no name")
        self.stack[-1] = _Made(self.stack[-1].text, arguments)

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Made) or self.stack[-1].state is not None:
            raise pickle.UnpicklingError("attributes are set of something that is no new object")
        self.stack[-1].state = state

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [(key, value)])

    def _set_items(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def _set(self, into: Any, items: Any) -> None:
        for key, value in items:  # other keys, such as tuples of tuples, may take for ever to hash
            if not isinstance(into, dict) or not isinstance(key, (str, _Made)):
                raise pickle.UnpicklingError("a dictionary has a key that is no name")
            into[key] = value

    dispatch[pickle.NEWOBJ[0]] = dispatch[pickle.REDUCE[0]] = _make
    dispatch[pickle.FRAME[0]] = _frame
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items


def read_table(directory: Path) -> Metadata:
    """The table of a checkpoint, its places in files checked against the files that are there.

    Raises:
        UserError: it cannot be read, holds something else, or says something that cannot be.
    """
    path = directory / TABLE_NAME
    try:
        facts = path.stat()
        return _read(directory, (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the unpickler raises a dozen kinds for what is no pickle
        said = (
            error if isinstance(error, (ValueError, pickle.UnpicklingError)) else f"no table ({type(error).__name__})"
        )
        raise UserError(f"{path}: cannot be read: {said}") from None


@functools.lru_cache(maxsize=2)  # a start asks twice: what is there, and where it is
def _read(directory: Path, _identity: tuple[int, ...]) -> Metadata:
    return _checked(_Reader(read_file(directory / TABLE_NAME, _MOST_BYTES)).load(), directory)


def _checked(table: Any, directory: Path) -> Metadata:
    tensors, places = _field(table, "Metadata", "state_dict_metadata"), _field(table, "Metadata", "storage_data")
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        raise ValueError("it has no tensors")
    stored = {_text(name): _tensor(item) for name, item in tensors.items() if _kind(item) != "BytesStorageMetadata"}
    found = {_index(index): _place(place) for index, place in places.items()}
    _check_places(found, directory)
    for name, tensor in stored.items():
        held = 0
        for chunk in tensor.chunks:
            place, count = found.get(MetadataIndex(name, chunk.offsets)), math.prod(chunk.sizes)
            if place is None:
                raise ValueError(f"it does not say where {printable(name)} is")
            if count * tensor.properties.dtype.itemsize > place.length:
                raise ValueError(f"{printable(name)} is larger than its place in {place.relative_path}")
            held += count
        if held != tensor.size.numel():
            raise ValueError(f"it has {held} of the {tensor.size.numel()} elements of {printable(name)}")
    return Metadata(dict(stored), storage_data=found, storage_meta=StorageMeta())


def _check_places(places: dict[MetadataIndex, _StorageInfo], directory: Path) -> None:
    """Raises ValueError for places beyond the end of their file, or that overlap."""
    by_file: dict[str, list[tuple[int, int]]] = {}
    for place in places.values():
        by_file.setdefault(place.relative_path, []).append((place.offset, place.offset + place.length))
    for name, spans in by_file.items():
        facts = os.lstat(directory / name)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError(f"{name} is a link or no regular file")
        spans.sort()
        ends = [0, *(end for _, end in spans)]
        if ends[-1] > facts.st_size or any(start < end for (start, _), end in zip(spans, ends, strict=False)):
            raise ValueError(f"it names bytes of {name} twice, or beyond its end ({facts.st_size} bytes)")


def _tensor(item: Any) -> TensorStorageMetadata:
    size = _size(_field(item, "TensorStorageMetadata", "size"))
    properties, chunks = (_field(item, "TensorStorageMetadata", key) for key in ("properties", "chunks"))
    state = properties.state if _kind(properties) == "TensorProperties" else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, torch.dtype) or not isinstance(chunks, list):
        raise ValueError("a tensor has no type or no chunks")
    return TensorStorageMetadata(TensorProperties(dtype), size, [_chunk(chunk, size) for chunk in chunks])


def _chunk(item: Any, whole: torch.Size) -> ChunkStorageMetadata:
    offsets, sizes = (_size(_field(item, "ChunkStorageMetadata", key)) for key in ("offsets", "sizes"))
    if len(offsets) != len(whole) or len(sizes) != len(whole):
        raise ValueError("a chunk has other dimensions than its tensor")
    if any(offset + size > end for offset, size, end in zip(offsets, sizes, whole, strict=True)):
        raise ValueError("a chunk reaches beyond its tensor")
    return ChunkStorageMetadata(offsets, sizes)


def _index(item: Any) -> MetadataIndex:
    offset = item.state.get("offset") if _kind(item) == "MetadataIndex" and isinstance(item.state, dict) else None
    return MetadataIndex(_text(_field(item, "MetadataIndex", "fqn")), None if offset is None else _size(offset))


def _place(item: Any) -> _StorageInfo:
    name, offset, length = (_field(item, "_StorageInfo", key) for key in ("relative_path", "offset", "length"))
    if not isinstance(name, str) or not _FRAGMENT_FILE.fullmatch(name):
        raise ValueError(f"{printable(name)[:100]!r} is no name of a file of a checkpoint")
    return _StorageInfo(name, _count(offset), _count(length))


def _size(item: Any) -> torch.Size:
    found = item.arguments if _kind(item) == "Size" else None
    values = found[0] if isinstance(found, tuple) and len(found) == 1 else None
    if not isinstance(values, tuple) or len(values) > _MOST_DIMENSIONS:
        raise ValueError("a size is none")
    size = torch.Size([_count(value) for value in values])
    if math.prod(size) >= 1 << 62:
        raise ValueError("a size is too large")
    return size


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError("a size or place is negative, too large, or no number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a tensor's name is no text")
    return value


def _kind(item: Any) -> str | None:
    return item.kind if isinstance(item, _Made) else None


def _field(item: Any, kind: str, key: str) -> Any:
    if _kind(item) != kind or not isinstance(item.state, dict) or key not in item.state:
        raise ValueError(f"it holds something else where a {kind} with {key} should be")
    return item.state[key]
