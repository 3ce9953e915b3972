"""The dense feed-forward layer."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """A linear layer, GELU (tanh), and a second linear layer: (..., C) -> (..., C)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if _has_fused_kernel(x):
            weights = self.fc1.weight, self.fc1.bias
            return self.fc2(torch.ops.mkldnn._linear_pointwise(x, *weights, "gelu", [], "tanh"))
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _has_fused_kernel(x: Tensor) -> bool:
    """Whether oneDNN can compute the first layer and its GELU in one kernel: on a CPU, without gradients.

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
