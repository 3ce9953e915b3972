"""The MoE feed-forward layer: y = shared(x) + sum_K weight x expert(x).

Shapes: B batch, L positions, T = B L, C width, S scales, E experts, K choices a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mepa_ds.config.model import ModelConfig
from mepa_ds.models.feed_forward import FeedForward
from mepa_ds.models.moe.dispatch import Dispatcher, LocalDispatcher
from mepa_ds.models.moe.experts import Experts
from mepa_ds.models.moe.routing import ROUTERS, RoutingStatistics


class MoEFeedForward(nn.Module):
    """A router, a dispatcher and experts. Under expert parallelism, the engine replaces the dispatcher and the experts.

    `first_expert` is the global number of the first expert held here: 0 without expert parallelism.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.moe is not None
        self.num_scales = len(config.scales)
        self.num_experts = config.moe.num_experts
        self.first_expert = 0
        self.router = ROUTERS[config.moe.router](config.C, self.num_scales, config.moe)
        self.experts = Experts(config.moe.num_experts, config.C, config.expert_hidden)
        self.shared = FeedForward(config.C, config.expert_hidden) if config.moe.shared_expert else None
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x_BLC: Tensor, scale_index_L: Tensor) -> tuple[Tensor, RoutingStatistics]:
        """Maps (B, L, C) and the 0-based scale of each position (L,) to (B, L, C) and the routing statistics."""
        x_TC = x_BLC.reshape(-1, x_BLC.shape[-1])
        # Neither routing nor its statistics may be autocast: bf16 cannot even count to 1000.
        with torch.autocast(x_BLC.device.type, enabled=False):
            routing = self.router(x_TC, scale_index_L)
            statistics = RoutingStatistics.of(routing, scale_index_L, self.num_scales)
        y_TC = self.dispatcher(x_TC, routing, self.experts, self.shared)
        return y_TC.to(x_BLC.dtype).view_as(x_BLC), statistics
