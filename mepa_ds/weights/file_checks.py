"""What files of weights say of their sizes, held against the files themselves before memory is taken for it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mepa_ds.errors import UserError
from mepa_ds.files import check_regular
from mepa_ds.safety.reading import parse_json

_MOST_HEADER = 1 << 25
"""Bytes of a safetensors header: those of the largest models have a few million."""
_MOST_PICKLE = 1 << 26
"""Bytes of all in a file of torch.save that is no storage."""
_SHARED = 4
"""How many times the file's bytes its tensors may have: tied weights have several names."""
_SLACK = 1 << 26
"""Bytes, and numbers, that small files may have beyond: buffers that are computed, broadcast constants."""
_TENSORS_EACH = 4
"""Tensors that a network may make for each one that its weights have, while it is made."""
_FACTORIES = {
    getattr(torch, name)
    for name in ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")
}


def check_safetensors(path: Path) -> None:
    """Raises ValueError for a header that is longer than the file, or than headers are. All else the library checks."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"its header would have {length} bytes, but the file has {size}")
        if length > _MOST_HEADER:
            raise ValueError(f"its header has {length} bytes, more than the {_MOST_HEADER} that are read")
        parse_json(file.read(length))


def check_torch_file(path: Path) -> None:
    """Looks at a file of torch.save before it is read.

    Raises:
        OSError: it cannot be read, or is a pipe or a device.
        UserError: it is a zip archive without its end, as half a download is; or one whose members are compressed, or
            overlap, as those of torch.save never do: what they unpack to has nothing to do with the file's size.
    """
    check_regular(path)
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except zipfile.BadZipFile:
            raise UserError("its end is missing; copy or download it again") from None
        except Exception:  # zipfile's errors are many; torch says what is wrong
            return
        size = os.fstat(file.fileno()).st_size
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UserError("its members are compressed, which torch.save does not do")
    if sum(member.file_size for member in members) > size:
        raise UserError(f"its members would have more bytes than the file, which has {size}")
    if any(member.file_size > _MOST_PICKLE for member in members if member.filename.endswith(".pkl")):
        raise UserError(f"its pickle has more than the {_MOST_PICKLE} bytes that are read")


def check_tensors(tree: Any, path: Path) -> None:
    """Raises UserError for tensors in what torch.load gave that have no numbers of their own (meta, sparse, quantised),
    and for views that together are much larger than the file: a stride of 0 makes terabytes out of one number."""
    most = _SHARED * path.stat().st_size + _SLACK
    total = 0
    for tensor in _tensors_in(tree):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise UserError("it holds a tensor that is no plain array of numbers (sparse, quantised or without values)")
        total += tensor.numel() * tensor.element_size()
        if total > most:
            raise UserError("its tensors would be many times larger than the file")


def check_fits(make: Callable[[], object], state: Mapping[str, Tensor], where: str) -> None:
    """Makes a network on the meta device, and raises UserError as soon as it has become much larger than its weights.

    A config.json that somebody else wrote may say any size; memory is taken when it has passed this.
    """
    with torch.device("meta"), _Counting(sum(map(torch.numel, state.values())), len(state), where):
        try:
            make()
        except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # sizes beyond 64 bits
            raise UserError(_too_large(where)) from error


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError for NaN or infinity in weights that training is to go on from."""
    bad = [name for name, tensor in state.items() if not tensor.float().isfinite().all()]
    if bad:
        raise UserError(
            f"{where}: NaN or infinity in {len(bad)} of its {len(state)} tensors, such as {bad[0]}; give weights from "
            "before they broke, such as `best` of the run"
        )


class _Counting(TorchFunctionMode):
    def __init__(self, numbers: int, tensors: int, where: str):
        super().__init__()
        self._numbers, self._tensors = 2 * numbers + _SLACK, _TENSORS_EACH * tensors + 200
        self._where = where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FACTORIES:
            self._numbers -= result.numel()
            self._tensors -= 1
            if self._numbers < 0 or self._tensors < 0:
                raise UserError(_too_large(self._where))
        return result


def _too_large(where: str) -> str:
    return f"{where}: the config asks for a network that is much larger than the weights; copy both again"


def _tensors_in(tree: Any) -> Iterator[Tensor]:
    left, seen = [tree], set[int]()  # a pickle may hold itself
    while left:
        node = left.pop()
        if isinstance(node, Tensor):
            yield node
        elif isinstance(node, Mapping | list | tuple) and id(node) not in seen:
            seen.add(id(node))
            left.extend(node.values() if isinstance(node, Mapping) else node)
