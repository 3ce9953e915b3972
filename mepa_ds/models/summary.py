"""How large a model is: total and active parameters, always apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mepa_ds.config.model import ModelConfig
from mepa_ds.models.transformer import NextScaleTransformer


@dataclass(frozen=True)
class ParameterCounts:
    """The transformer's parameters; the training-only projector of semantic guidance is not among them."""

    total: int
    active: int
    """Those that one token passes: all but the routed experts it is not sent to."""
    experts: int
    """All routed experts' (part of total)."""

    def __str__(self) -> str:
        return f"{self.total / 1e6:.1f}M parameters, {self.active / 1e6:.1f}M active"


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Counts on the meta device: no memory is used, whatever the size."""
    with torch.device("meta"):
        model = NextScaleTransformer(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    used = experts * config.moe.top_k // config.moe.num_experts if config.moe else 0
    return ParameterCounts(total, total - experts + used, experts)
