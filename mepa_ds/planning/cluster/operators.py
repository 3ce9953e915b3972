"""The work of a forward and backward pass, counted operator by operator while it runs with fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# These read only the rows that they return, however long the table is.
_GATHERS = {"aten::index_select", "aten::gather", "aten::embedding", "aten::index"}
_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
"""What attention is here; PyTorch counts the operators of GPUs alone."""
_NO_KERNEL = {
    "prim::device",
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty_strided",
    "aten::_unsafe_view",
}


@dataclass(frozen=True)
class Operators:
    """Sums over all operators of a pass. They grow linearly with the images, beside a constant of the weights."""

    matrix_flops: float
    """Floating-point operations of matrix products, attention and convolutions; recomputed ones too."""
    other_bytes: float
    """Bytes that all other operators read and write."""
    count: float
    """Kernels that a GPU would be given, one an operator: nothing is fused."""

    def between(self, other: Operators, share: float) -> Operators:
        """Returns the work on the line through both: 0 is this one, 1 the other; beyond 1 too."""
        return Operators(*(a + share * (b - a) for a, b in zip(self._values(), other._values(), strict=True)))

    def _values(self) -> tuple[float, float, float]:
        return self.matrix_flops, self.other_bytes, self.count


class OperatorCount(TorchDispatchMode):
    """Counts what runs within it. Views and fresh memory are free."""

    def __init__(self) -> None:
        super().__init__()
        self._flops = self._bytes = self._count = 0

    @property
    def operators(self) -> Operators:
        return Operators(self._flops, self._bytes, self._count)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if _is_free(func):
            return result
        self._count += 1
        flops = _matrix_flops(func, args, kwargs, result)
        self._flops += flops
        if flops == 0:
            self._bytes += _moved_bytes(func, (args, kwargs), result)
        return result


def _matrix_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """0 for an operator that is no matrix product."""
    if func._schema.name == _ATTENTION:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if func._schema.name == f"{_ATTENTION}_backward":
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    packet = getattr(func, "overloadpacket", None)
    return int(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0


def _is_free(func: Any) -> bool:
    """Whether an operator moves nothing: it returns a view, or memory that nobody has written."""
    if func._schema.name in _NO_KERNEL:
        return True
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _moved_bytes(func: Any, inputs: Any, outputs: Any) -> int:
    written = sum(_bytes_of(tensor) for tensor in _tensors(outputs))
    read = [_bytes_of(tensor) for tensor in _tensors(inputs)]
    if func._schema.name in _GATHERS:
        read = [min(size, written) for size in read]
    return written + sum(read)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _bytes_of(tensor: Tensor) -> int:
    """The bytes of a tensor; of an expanded one those that exist."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
