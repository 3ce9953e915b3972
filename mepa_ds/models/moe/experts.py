"""The routed experts' weights and their grouped matrix products.

Shapes: R rows (one for each routed (token, choice) pair), E experts held here, C width, F hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """E two-layer GELU FFNs, stacked so that every expert has a gradient on every step (ZeRO-2 relies on it)."""

    def __init__(self, num_experts: int, width: int, hidden: int):
        super().__init__()
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, hidden))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, width))

    @property
    def num_experts(self) -> int:
        return self.fc1_weight.shape[0]

    def forward(self, x_RC: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert -> (R, C); `counts_E` says how many rows each expert has (0 is fine)."""
        if x_RC.is_cuda:
            return self._grouped(x_RC, counts_E)
        return self._loop(x_RC, counts_E.tolist())

    def _grouped(self, x_RC: Tensor, counts_E: Tensor) -> Tensor:
        """One grouped GEMM a layer: fastest on a GPU, and free of host syncs."""
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        expert_R = torch.repeat_interleave(
            torch.arange(self.num_experts, device=x_RC.device), counts_E, output_size=x_RC.shape[0]
        )
        hidden_RF = F.grouped_mm(x_RC, self.fc1_weight.transpose(1, 2), offs=offsets_E) + self.fc1_bias[expert_R]
        hidden_RF = F.gelu(hidden_RF, approximate="tanh")
        return F.grouped_mm(hidden_RF, self.fc2_weight.transpose(1, 2), offs=offsets_E) + self.fc2_bias[expert_R]

    def _loop(self, x_RC: Tensor, counts: list[int]) -> Tensor:
        """A GEMM pair for each expert: a CPU is compute-bound, and its BLAS beats the grouped kernel."""
        outputs = []
        stacks = (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        each_expert = zip(*(stack.unbind() for stack in stacks), strict=True)
        for rows_C, (w1, b1, w2, b2) in zip(x_RC.split(counts), each_expert, strict=True):
            hidden = F.gelu(F.linear(rows_C, w1, b1), approximate="tanh")
            outputs.append(F.linear(hidden, w2, b2))
        return torch.cat(outputs)
