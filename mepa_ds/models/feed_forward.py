"""The dense feed-forward layer, and GELU with its derivative on a CPU."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK = 2**16
"""Elements a thread at a time: with what is computed from them they stay in its cache between operations."""
# gelu(x) = x sigmoid(u) with u = 2 sqrt(2 / pi) (x + 0.044715 x^3), which is the same as by tanh.
_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


class FeedForward(nn.Module):
    """A linear layer, GELU (tanh), and a second linear layer: (..., C) -> (..., C)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if has_fused_kernel(x):
            return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias))
        return self.fc2(gelu(self.fc1(x)))


def has_fused_kernel(x: Tensor) -> bool:
    """Whether oneDNN can compute a linear layer and its GELU in one kernel: on a CPU, without gradients.

    PyTorch's own tanh GELU is slow on a CPU. Inductor uses the same operator.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.numel() == 0 or x.dtype not in fused_gelu_types():
        return False
    elsewhere = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return bool(torch.backends.mkldnn.enabled) and not elsewhere


@cache
def fused_gelu_types() -> tuple[torch.dtype, ...]:
    """The types in which oneDNN has one kernel for a linear layer and GELU on this CPU."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    low = (torch.bfloat16,) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
    return torch.float32, *low


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x W^T + b) in one kernel, where `has_fused_kernel`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")


def gelu(x: Tensor) -> Tensor:
    """GELU (tanh), which on a CPU keeps its derivative for the backward pass instead of its input."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled()):
        return F.gelu(x, approximate="tanh")
    return _Gelu.apply(x)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        hidden, slope = torch.ops.mepa_ds.gelu_with_slope(x)
        ctx.save_for_backward(slope)
        return hidden

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return gradient * slope


@torch.library.custom_op("mepa_ds::gelu_with_slope", mutates_args=())
def gelu_with_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU (tanh) and its derivative: (...) -> two of (...). One registered operator, for tracing and compilers."""
    x = x.contiguous()
    hidden, slope = torch.empty_like(x), torch.empty_like(x)
    write_gelu(x, hidden, slope)
    return hidden, slope


@gelu_with_slope.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    return torch.empty_like(x), torch.empty_like(x)


def write_gelu(x: Tensor, hidden: Tensor, slope: Tensor) -> None:
    """Writes gelu(x) and its derivative, all contiguous and of one shape; `slope` may be x itself.

    PyTorch's tanh GELU and its gradient take several times as long on a CPU as the memory they touch. Here both come
    from one sigmoid s: gelu = x s, gelu' = s + x s (1 - s) u'. Half types are computed in fp32.
    """
    if x.device.type != "cpu":
        torch.ops.aten.gelu.out(x, approximate="tanh", out=hidden)
        torch.ops.aten.gelu_backward.grad_input(torch.ones_like(x), x, approximate="tanh", grad_input=slope)
        return
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    chunk = _CHUNK * torch.get_num_threads()
    buffers = x.new_empty(4, min(chunk, x.numel()), dtype=wide)
    parts = [tensor.view(-1).split(chunk) for tensor in (x, hidden, slope)]
    for x_part, hidden_part, slope_part in zip(*parts, strict=True):
        _write_gelu_part(x_part, hidden_part, slope_part, buffers)


def _write_gelu_part(x: Tensor, hidden: Tensor, slope: Tensor, buffers: Tensor) -> None:
    wide, square, s, product = buffers[:, : len(x)]
    if x.dtype != wide.dtype:
        x = wide.copy_(x)
    torch.mul(x, x, out=square)
    torch.mul(square, _CUBIC, out=s).add_(_LINEAR).mul_(x).sigmoid_()
    torch.mul(x, s, out=product)
    hidden.copy_(product)
    square.mul_(3 * _CUBIC).add_(_LINEAR).mul_(product)  # x s u'
    slope.copy_(square.addcmul_(square, s, value=-1).add_(s))
