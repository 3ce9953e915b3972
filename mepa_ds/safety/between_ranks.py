"""Messages between ranks: JSON and tensors, as bytes in tensors. PyTorch's own messages are pickles, which run code.

What reaches a rank's port may come from anybody on an open network (SECURITY.md): nothing of it is executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

JsonT = TypeVar("JsonT")
_MOST_BYTES = 1 << 28
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def broadcast(mine: JsonT, group: dist.ProcessGroup | None = None) -> JsonT:
    """Rank 0's value: of texts, numbers, booleans, None, lists, and dictionaries with texts as keys. Collective."""
    data = _encoded(mine) if dist.get_rank() == 0 else _bytes(b"")
    device = _device(group)
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, 0, group)
    sent = data.to(device) if dist.get_rank() == 0 else _empty(int(size), device)
    dist.broadcast(sent, 0, group)
    return _decoded(sent) if dist.get_rank() else mine


def all_gather(mine: JsonT, group: dist.ProcessGroup | None = None) -> list[JsonT]:
    """The value of every rank, by rank; of the same types as for `broadcast`. Collective."""
    return [_decoded(data) for data in _gathered(_encoded(mine), group)]


def all_gather_tensors(mine: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> list[dict[str, Tensor]]:
    """The CPU tensors of every rank, by rank and name. Collective."""
    tensors = {name: tensor.contiguous() for name, tensor in mine.items()}
    shapes = all_gather({name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}, group)
    data = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values() if tensor.numel()]
    everyone = _gathered(torch.cat(data) if data else _bytes(b""), group)
    return [_split(found, dict(named)) for found, named in zip(everyone, shapes, strict=True)]


def _split(data: Tensor, shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    found, start = {}, 0
    for name, (dtype, shape) in shapes.items():
        end = start + math.prod(shape) * _DTYPES[dtype].itemsize
        part = data[start:end].clone()  # aligned for its type
        found[name] = part.view(_DTYPES[dtype]).view(shape) if end > start else torch.empty(shape, dtype=_DTYPES[dtype])
        start = end
    return found


def _gathered(data: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The bytes of every rank. Each rank sends as many as the one that has most."""
    device, ranks = _device(group), dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device), group)
    lengths = [int(size) for size in sizes]
    sent = _empty(max(lengths), device, limited=False)
    sent[: len(data)] = data.to(device)
    found = [torch.empty_like(sent) for _ in range(ranks)]
    dist.all_gather(found, sent, group)
    return [part[:length].cpu() for part, length in zip(found, lengths, strict=True)]


def _empty(size: int, device: torch.device, limited: bool = True) -> Tensor:
    if size < 0 or (limited and size > _MOST_BYTES):
        raise RuntimeError(f"a message between ranks says that it has {size} bytes: it is not one of this program's")
    return torch.zeros(size, dtype=torch.uint8, device=device)


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors must be that this group sends."""
    is_nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _encoded(value: Any) -> Tensor:
    return _bytes(json.dumps(value).encode())


def _decoded(data: Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())
