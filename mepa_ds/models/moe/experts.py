"""The weights of the routed experts, and their products as grouped GEMMs (mepa_ds.models.moe.expert_loop: in a loop).

Shapes: R rows (one for each routed (token, choice) pair), E experts held here, C width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mepa_ds.models.moe.expert_loop import looped_experts


class Experts(nn.Module):
    """E FFNs of two layers with GELU (tanh).

    Their weights are stacked in four tensors, so that every expert has a gradient in every step: ZeRO-2 relies on it.
    """

    def __init__(self, num_experts: int, width: int, hidden: int):
        super().__init__()
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, hidden))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, width))

    @property
    def num_experts(self) -> int:
        return self.fc1_weight.shape[0]

    def forward(self, x_RC: Tensor, counts_E: Tensor, counts: list[int] | None = None) -> Tensor:
        """Applies each expert to its rows: (R, C), sorted by expert -> (R, C).

        `counts_E` holds the number of rows of each expert, which may be 0. `counts` are the same numbers on the host: a
        dispatcher that has them gives them, which saves the loop a host sync.
        """
        tensors = [x_RC, self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias]
        if torch.is_autocast_enabled(x_RC.device.type):
            tensors = [tensor.to(torch.get_autocast_dtype(x_RC.device.type)) for tensor in tensors]
        if has_grouped_kernel(tensors):
            return grouped_experts(tensors, counts_E)
        return looped_experts(tensors, counts_E.tolist() if counts is None else counts)


def has_grouped_kernel(tensors: Sequence[Tensor]) -> bool:
    """Whether grouped_mm is a single kernel here: bf16, on compute capability 9 or 10, with rows of whole 16 bytes.

    Elsewhere torch falls back to a loop of its own, and copies the offsets to the host at every call. Our loop copies
    them once a layer.
    """
    x_RC, w1_EFC, *_ = tensors
    if not x_RC.is_cuda or x_RC.dtype != torch.bfloat16 or any(size % 8 for size in w1_EFC.shape[1:]):
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(x_RC.device)[0] in (9, 10)


def grouped_experts(tensors: Sequence[Tensor], counts_E: Tensor) -> Tensor:
    """Computes all experts in two grouped GEMMs, without a host sync where the kernel is native.

    `tensors` are the rows (R, C), the weights (E, F, C) and biases (E, F) of the first layer, and the weights (E, C, F)
    and biases (E, C) of the second.
    """
    x_RC, w1_EFC, b1_EF, w2_ECF, b2_EC = tensors
    if x_RC.is_cuda and torch.cuda.get_device_capability(x_RC.device)[0] == 10:
        w1_EFC, w2_ECF = NoRowsNoGradient.apply(w1_EFC, counts_E), NoRowsNoGradient.apply(w2_ECF, counts_E)
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    numbers_E = torch.arange(len(counts_E), device=x_RC.device)
    expert_R = torch.repeat_interleave(numbers_E, counts_E, output_size=x_RC.shape[0])
    hidden_RF = _AddBias.apply(F.grouped_mm(x_RC, w1_EFC.transpose(1, 2), offs=offsets_E), b1_EF, expert_R)
    hidden_RF = F.gelu(hidden_RF, approximate="tanh")
    return _AddBias.apply(F.grouped_mm(hidden_RF, w2_ECF.transpose(1, 2), offs=offsets_E), b2_EC, expert_R)


class NoRowsNoGradient(torch.autograd.Function):
    """Passes the weights on unchanged, and sets the gradient of an expert without rows to 0.

    On Blackwell, grouped_mm may leave the previous content of its accumulator there: pytorch/pytorch#172439.
    """

    @staticmethod
    def forward(ctx: Any, weight_EFC: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(counts_E)
        return weight_EFC.view_as(weight_EFC)

    @staticmethod
    def backward(ctx: Any, grad_EFC: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (counts_E,) = ctx.saved_tensors
        return grad_EFC.masked_fill((counts_E == 0)[:, None, None], 0), None


class _AddBias(torch.autograd.Function):
    """y + b[expert of the row].

    The gradient of b is a product with one-hot rows, which is faster than to add R rows onto E.
    """

    @staticmethod
    def forward(ctx: Any, y_RF: Tensor, bias_EF: Tensor, expert_R: Tensor) -> Tensor:
        ctx.save_for_backward(expert_R)
        ctx.num_experts = len(bias_EF)
        return y_RF + bias_EF.index_select(0, expert_R)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (expert_R,) = ctx.saved_tensors
        expert_RE = F.one_hot(expert_R, ctx.num_experts).to(grad_RF.dtype)
        return grad_RF, expert_RE.T @ grad_RF, None
