"""The elements of a tensor as DCP stores them: a ZIP archive that `torch.save` made, within a larger file."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import ReadItem

_DATA = "/data/0"
_LOCAL_HEADER = struct.Struct("<4s22sHH")
_END = struct.Struct("<4s8xL6x")
_MOST_LIST_BYTES = 1 << 16
"""What PyTorch puts behind the elements is small: names of a few members, and where they are."""


class _Part(io.RawIOBase):
    """Some bytes of a file, as a file of their own to read."""

    def __init__(self, file: IO[bytes], offset: int, length: int):
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        self._at = to + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise ValueError("a place before its beginning")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(min(len(buffer), self._length - self._at), 0))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def read_elements(file: IO[bytes], offset: int, length: int, item: ReadItem, into: Tensor) -> None:
    """Fills `into` with elements of the archive in `file` at `offset`; those that the item asks for.

    Only the bytes of the elements are read: the archive's own description of the tensor, a pickle, is left alone.

    Raises:
        ValueError: there is no such archive, or its elements are not the item's.
    """
    first, count = item.storage_offsets[0], item.lengths[0]
    start, size = _data(file, offset, length)
    if (first + count) * into.element_size() > size:
        raise ValueError(f"it holds {size} bytes of elements, too few")
    if into.dim() != 1 or len(into) != count:
        raise ValueError(f"{count} elements are stored, {tuple(into.shape)} are wanted")
    if not count:
        return
    direct = into.device.type == "cpu" and into.is_contiguous()
    elements = into if direct else torch.empty(count, dtype=into.dtype)
    file.seek(start + first * into.element_size())
    view = elements.view(torch.uint8).numpy().data
    while view:
        if not (got := file.readinto(view)):  # type: ignore[attr-defined]
            raise ValueError("it ends too early")
        view = view[got:]
    if not direct:
        into.copy_(elements)


def _data(file: IO[bytes], offset: int, length: int) -> tuple[int, int]:
    """Place in the file and number of the bytes of elements."""
    part = _Part(file, offset, length)
    part.seek(max(length - _END.size, 0))
    end = part.read(_END.size) or b""
    if len(end) != _END.size or end[:4] != b"PK\5\6" or _END.unpack(end)[1] > _MOST_LIST_BYTES:
        raise ValueError("it is no archive of PyTorch's")
    try:
        with zipfile.ZipFile(part) as archive:  # type: ignore[call-overload]
            data = [member for member in archive.infolist() if member.filename.endswith(_DATA)]
    except Exception as error:  # zipfile raises a dozen kinds for bytes that changed
        raise ValueError(f"it is no archive of PyTorch's ({error})") from None
    if len(data) != 1 or data[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is no archive of one tensor")
    at = offset + data[0].header_offset
    if not offset <= at <= offset + length - _LOCAL_HEADER.size:
        raise ValueError("its elements are outside of it")
    file.seek(at)
    magic, _, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = at + _LOCAL_HEADER.size + name + extra
    if magic != b"PK\3\4" or start + data[0].file_size > offset + length:
        raise ValueError("its elements are not where it says")
    return start, data[0].file_size
