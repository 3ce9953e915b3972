"""The size of a model: its total and its active parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mepa_ds.config.model import ModelConfig
from mepa_ds.models.transformer import NextScaleTransformer


@dataclass(frozen=True)
class ParameterCounts:
    """The parameters of the transformer. The projector of semantic guidance, for training only, is not counted."""

    total: int
    active: int
    """Parameters that one token passes: all but those of the routed experts to which it is not sent."""
    experts: int
    """Parameters of all routed experts, a part of the total."""

    def __str__(self) -> str:
        return f"{self.total / 1e6:.1f}M parameters, {self.active / 1e6:.1f}M active"


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Counts a model's parameters on the meta device, which takes no memory."""
    with torch.device("meta"):
        model = NextScaleTransformer(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    used = experts * config.moe.top_k // config.moe.num_experts if config.moe else 0
    return ParameterCounts(total, total - experts + used, experts)
