"""Self-attention over scales without a mask, and the key-value cache for sampling.

Shapes: B batch, L positions, C width, H heads, D = C / H width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KVCache:
    """The keys and values of one block. Memory for all L positions is allocated once, and filled scale by scale."""

    def __init__(self, batch: int, num_heads: int, length: int, head_width: int, like: Tensor):
        self._keys_BHLD = like.new_empty(batch, num_heads, length, head_width)
        self._values_BHLD = torch.empty_like(self._keys_BHLD)
        self._filled = 0

    def append(self, k_BHLD: Tensor, v_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the keys and values of one scale (B, H, l, D), and returns those of all positions so far."""
        end = self._filled + k_BHLD.shape[2]
        self._keys_BHLD[:, :, self._filled : end] = k_BHLD
        self._values_BHLD[:, :, self._filled : end] = v_BHLD
        self._filled = end
        return self._keys_BHLD[:, :, :end], self._values_BHLD[:, :, :end]


class SelfAttention(nn.Module):
    """VAR's attention. Queries and values have biases, keys have none.

    With `qk_norm`, queries and keys are L2-normalised, and each head learns the logarithm of a temperature. Without it,
    the softmax scale is 0.25 / sqrt(D), as in VAR. A `markovian` one sees no scale but its own.
    """

    MAX_LOG_TEMPERATURE = math.log(100)

    def __init__(self, width: int, num_heads: int, qk_norm: bool, markovian: bool = False):
        super().__init__()
        self.num_heads, self.markovian = num_heads, markovian
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.log_temperature = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0))) if qk_norm else None
        self.softmax_scale = 1.0 if qk_norm else 0.25 / math.sqrt(width // num_heads)

    def forward(self, x_BLC: Tensor, bounds: Sequence[tuple[int, int]], cache: KVCache | None = None) -> Tensor:
        """Lets each scale attend to itself and, unless `markovian`, to all scales before it: (B, L, C) -> (B, L, C).

        In training, `bounds` are the (start, end) of each scale in the whole sequence. In sampling, x is one scale,
        `cache` holds the scales before it, and `bounds` is not used.
        """
        B, L, C = x_BLC.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BLC, self.qkv.weight, bias).view(B, L, 3, self.num_heads, C // self.num_heads)
        q_BHLD, k_BHLD, v_BHLD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.log_temperature is not None:
            temperature = self.log_temperature.clamp_max(self.MAX_LOG_TEMPERATURE).exp()
            length = torch.linalg.vector_norm(q_BHLD, dim=-1, keepdim=True).clamp_min(1e-12)  # as F.normalize
            q_BHLD = q_BHLD * (temperature / length)
            k_BHLD = F.normalize(k_BHLD, dim=-1)
        if cache is not None:
            if not self.markovian:
                k_BHLD, v_BHLD = cache.append(k_BHLD, v_BHLD)
            out_BLHD = attend(q_BHLD, k_BHLD, v_BHLD, self.softmax_scale)
        elif self.markovian:
            out_BLHD = own_scale_attention(q_BHLD, k_BHLD, v_BHLD, bounds, self.softmax_scale)
        else:
            out_BLHD = prefix_attention(q_BHLD, k_BHLD, v_BHLD, bounds, self.softmax_scale)
        return self.proj(out_BLHD.reshape(B, L, C))


def attend(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, softmax_scale: float) -> Tensor:
    """Attention without a mask: queries (B, H, l, D), keys and values (B, H, L, D) -> (B, l, H, D)."""
    return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, scale=softmax_scale).transpose(1, 2)


def prefix_attention(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, bounds: Sequence[tuple[int, int]], softmax_scale: float
) -> Tensor:
    """Block-causal attention: each scale, whose (start, end) `bounds` hold, attends to all up to its end.

    One call without a mask for each scale does only the 62 % of the work that a mask would keep (256 px). Returns
    (B, L, H, D), in which the heads of a position lie side by side, as the output projection reads them.
    """
    dtype = q_BHLD.dtype
    q_BHLD, k_BHLD, v_BHLD = _in_a_fast_type(q_BHLD, k_BHLD, v_BHLD)
    ends = [end for _, end in bounds]
    queries = q_BHLD.split([end - start for start, end in bounds], dim=2)
    parts = zip(queries, prefixes(k_BHLD, ends), prefixes(v_BHLD, ends), strict=True)
    return torch.cat([attend(q, k, v, softmax_scale) for q, k, v in parts], dim=1).to(dtype)


def own_scale_attention(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, bounds: Sequence[tuple[int, int]], softmax_scale: float
) -> Tensor:
    """Block-diagonal attention: each scale attends to itself alone. Shapes as in `prefix_attention`."""
    dtype = q_BHLD.dtype
    q_BHLD, k_BHLD, v_BHLD = _in_a_fast_type(q_BHLD, k_BHLD, v_BHLD)
    lengths = [end - start for start, end in bounds]
    parts = zip(*(x_BHLD.split(lengths, dim=2) for x_BHLD in (q_BHLD, k_BHLD, v_BHLD)), strict=True)
    return torch.cat([attend(q, k, v, softmax_scale) for q, k, v in parts], dim=1).to(dtype)


def _in_a_fast_type(*x_BHLD: Tensor) -> tuple[Tensor, ...]:
    """In fp32 where the backward pass in their type takes longer: that of PyTorch's CPU kernel in half types."""
    is_half_on_cpu = x_BHLD[0].device.type == "cpu" and x_BHLD[0].dtype in (torch.bfloat16, torch.float16)
    if is_half_on_cpu and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        return tuple(x.float() for x in x_BHLD)
    return x_BHLD


def prefixes(x_BHLD: Tensor, ends: Sequence[int]) -> tuple[Tensor, ...]:
    """Views x[:, :, :end] for growing `ends`, of which the last is all of x. See `_Prefixes` for the gradient."""
    return _Prefixes.apply(x_BHLD, ends)


class _Prefixes(torch.autograd.Function):
    """The gradients of all prefixes, summed in one buffer.

    Autograd's own gradient of a slice fills a tensor of the whole length with zeros for each slice, and adds these.
    """

    @staticmethod
    def forward(ctx: Any, x_BHLD: Tensor, ends: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.ends = ends
        return tuple(x_BHLD[:, :, :end] for end in ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        *shorter, whole = grads
        total_BHLD = whole.clone()
        for end, grad in zip(ctx.ends, shorter, strict=False):
            total_BHLD[:, :, :end] += grad
        return total_BHLD, None
