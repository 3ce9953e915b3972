"""A CUDA device without a GPU: fake tensors that have shapes, types and a device, but no data.

The project's own code runs as on a Hopper GPU. A mix of devices raises, as it would there, and so does a tensor whose
size depends on data (`nonzero`, a boolean mask), for which the host would wait. `Counter` notes what each operator
would do: its bytes of memory traffic, its FLOPs, and whether the host waits for the device.
"""

from __future__ import annotations

import traceback
from collections import Counter as Multiset
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

CAPABILITY = (9, 0)  # of Hopper: grouped GEMMs are one kernel
_PACKAGE = Path(__file__).parent.parent / "mepa_ds"
_aten = torch.ops.aten
# Only the memory is named or set apart: no kernel runs.
_FREE = ("detach", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh", "device")
# What was there before is not read.
_OVERWRITING = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")
# The first family with a word that is in the operator's name has it; the rest is elementwise.
FAMILIES = {
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "gemm": ("mm", "linear", "convolution", "bmm"),
    "interpolate": ("upsample", "adaptive_avg_pool"),
    "slice_backward": ("slice_backward", "select_backward"),
    "norm": ("norm", "softmax", "logsumexp", "nll_loss"),
    "index": ("index", "embedding", "gather", "scatter", "sort", "topk", "repeat_interleave"),
    "copy": ("copy", "clone", "cat", "stack", "constant_pad"),
    "reduction": ("sum", "mean", "argmax", "argmin", "amin", "amax", "cumsum", "max", "min"),
    "optimizer": ("_foreach", "_fused_adam"),
}


class _Hopper(TorchFunctionMode):
    """Gives attention its fused kernels, which PyTorch looks for on the device, and lets CPU tensors be pinned."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_cuda:
            return _fused_attention(*args, **kwargs)
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.numpy:  # of a tensor with data
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`F.scaled_dot_product_attention` by the operator that a GPU takes: flash, with a mask or in fp32 the other."""
    if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        out, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)
    else:
        keeps = q.requires_grad or k.requires_grad or v.requires_grad
        out, *_ = _aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_mask, keeps, dropout_p, is_causal, scale=scale
        )
    return out


def _ones(tensor: FakeTensor) -> Any:
    """A list of the tensor's shape, for one look at the device."""
    one = tensor.reshape(-1)[0].item() if tensor.numel() else 0
    with unset_fake_temporarily():
        return torch.full(tensor.shape, one).tolist()


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Within, tensors on `cuda` are fake, with or without a GPU, and their device is a Hopper."""
    with ExitStack() as stack:
        stack.enter_context(patch("torch.cuda.get_device_capability", lambda device=None: CAPABILITY))
        stack.enter_context(patch.object(FakeTensor, "tolist", _ones))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Hopper())
        yield


@dataclass
class Work:
    """What the operators of one phase would do."""

    operators: Multiset[str] = field(default_factory=Multiset)
    """Kernels, by family. What only names memory anew is none."""
    bytes: Multiset[str] = field(default_factory=Multiset)
    """Bytes read and written, by family: every operand once, of rows that are gathered those rows."""
    flops: float = 0
    """Of matrix products and attention, by PyTorch's formulas."""
    waits: Multiset[str] = field(default_factory=Multiset)
    """Places in the package where the host waits for the device: a number or a tensor that it reads back."""


class Counter(TorchDispatchMode):
    """Counts the work of every operator on a fake CUDA device."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is _aten._local_scalar_dense.default and inputs[0].is_cuda:
            self._note_wait()
            kind = bool if inputs[0].dtype == torch.bool else float if inputs[0].is_floating_point() else int
            return kind(1)  # there is no data to read back
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        on_gpu = [tensor.is_cuda for tensor in (*inputs, *outputs)]
        name = func._schema.name.partition("::")[2]
        if any(on_gpu) and name not in _FREE and not _is_view(func, inputs, outputs):
            if _host_waits(inputs, outputs, kwargs.get("non_blocking", name == "copy_" and True in args[2:])):
                self._note_wait()
            family = _family(name)
            self.work.operators[family] += 1
            read, written = _operands(func, args, kwargs)
            self.work.bytes[family] += _traffic(name, read, written or outputs)
            if func is _aten._grouped_mm.default:  # PyTorch has no formula for it
                self.work.flops += 2 * inputs[0].numel() * inputs[1].shape[-1]
            elif (formula := flop_registry.get(func._overloadpacket)) is not None:
                self.work.flops += formula(*args, **kwargs, out_val=result)
        return result

    def _note_wait(self) -> None:
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(_PACKAGE)]
        where = frames[-1] if frames else None
        place = f"{Path(where.filename).relative_to(_PACKAGE.parent)}:{where.name}" if where else "outside the package"
        self.work.waits[place] += 1


def _host_waits(inputs: list[Tensor], outputs: list[Tensor], non_blocking: bool) -> bool:
    """Whether the host waits for the end of a copy: of each one from the device, and there of those that block."""
    if not inputs or not outputs or inputs[-1].is_cuda == outputs[0].is_cuda:
        return False
    return not outputs[0].is_cuda or not non_blocking


def _operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that an operator reads, and those of its arguments that it writes: both have what it updates."""
    read: list[Tensor] = []
    written: list[Tensor] = []
    name = func._schema.name.partition("::")[2]
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        written += tensors if writes else []
        overwrites = writes and (argument.is_out or name in _OVERWRITING)
        read += [] if overwrites else tensors
    return read, written


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether all outputs lie in memory of inputs, and nothing is written."""
    if any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments):
        return False
    there = {tensor.untyped_storage()._cdata for tensor in inputs}
    return bool(outputs) and all(tensor.untyped_storage()._cdata in there for tensor in outputs)


def _family(name: str) -> str:
    for family in ("optimizer", *FAMILIES):
        if any(word in name for word in FAMILIES[family]):
            return family
    return "elementwise"


def _size(tensor: Tensor) -> int:
    """Bytes that a kernel reads or writes: an expanded dimension has one element."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else min(length, 1)
    return count * tensor.element_size()


def _traffic(name: str, read: list[Tensor], written: list[Tensor]) -> int:
    """Bytes read and written by one operator, as if each operand were read once and each result written once."""
    result = sum(map(_size, written))
    if name in ("index_select", "embedding", "gather", "index"):
        return 2 * result  # of the table, only the rows that are asked for
    if name in ("_embedding_bag", "_embedding_bag_forward_only"):
        table, index = read[0], read[1]
        return index.numel() * table.shape[1] * table.element_size() + _size(written[0]) + _size(index)
    if name in ("slice_backward", "select_backward"):
        return 2 * sum(map(_size, read)) + result  # the whole is set to zero, then the part is copied
    if name in ("zeros_like", "ones_like", "full_like"):
        return result
    return sum(map(_size, read)) + result


def zero_partitions(optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimizer what ZeRO gives it on one rank: the fp32 parameters of a group as one flat tensor."""
    for group in optimizer.param_groups:
        size = sum(parameter.numel() for parameter in group["params"])
        flat = nn.Parameter(torch.empty(size, device="cuda"))
        flat.grad = torch.empty_like(flat)
        group["params"] = [flat]
        if not group.get("fused"):  # what PyTorch chooses for tensors with data
            group["foreach"] = True
