"""Block-causal self-attention without a mask, and the key-value cache for sampling.

Shapes: B batch, L positions, C width, H heads, D = C / H width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    the softmax scale is 0.25 / sqrt(D), as in VAR.
    """

    MAX_LOG_TEMPERATURE = math.log(100)

    def __init__(self, width: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.log_temperature = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0))) if qk_norm else None
        self.softmax_scale = 1.0 if qk_norm else 0.25 / math.sqrt(width // num_heads)

    def forward(self, x_BLC: Tensor, bounds: Sequence[tuple[int, int]], cache: KVCache | None = None) -> Tensor:
        """Lets each scale attend to itself and to all scales before it: (B, L, C) -> (B, L, C).

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
            k_BHLD, v_BHLD = cache.append(k_BHLD, v_BHLD)
            out_BHLD = self._attend(q_BHLD, k_BHLD, v_BHLD)
        else:
            # One call without a mask for each scale does only the 62 % of the work that a mask would keep (256 px).
            prefixes = (
                self._attend(q_BHLD[:, :, start:end], k_BHLD[:, :, :end], v_BHLD[:, :, :end]) for start, end in bounds
            )
            out_BHLD = torch.cat(list(prefixes), dim=2)
        return self.proj(out_BHLD.transpose(1, 2).reshape(B, L, C))

    def _attend(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, scale=self.softmax_scale)
