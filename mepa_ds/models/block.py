"""One block of the next-scale transformer: attention and an FFN, each modulated by the class (AdaLN).

Shapes: B batch, L positions of all scales, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mepa_ds.config.model import ModelConfig
from mepa_ds.models.attention import KVCache, SelfAttention
from mepa_ds.models.feed_forward import FeedForward
from mepa_ds.models.moe.layer import MoEFeedForward
from mepa_ds.models.moe.routing import RoutingStatistics

LAYER_NORM_EPS = 1e-6


class Block(nn.Module):
    """Two residual branches: AdaLN and attention, then AdaLN and an FFN (dense or mixture of experts).

    The class gates the output of each branch by gamma; stochastic depth scales it per sample.
    """

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        C = config.C
        self.attention = SelfAttention(C, config.H, config.qk_norm, config.markovian)
        self.ffn: FeedForward | MoEFeedForward
        if config.is_moe_block(index):
            self.ffn = MoEFeedForward(config)
        else:
            self.ffn = FeedForward(C, round(config.ffn_ratio * C))
        if config.shared_adaln:
            self.adaln_offset = nn.Parameter(torch.empty(1, 1, 6, C))
        else:
            self.adaln = nn.Linear(C, 6 * C)

    def modulation(self, condition: Tensor) -> Tensor:
        """The gates, scales and shifts of both branches, (B, 1, 6, C): the same at every position.

        `condition` is silu(class embedding), (B, C); with shared AdaLN it is the projection of that, (B, 1, 6, C).
        """
        if hasattr(self, "adaln_offset"):
            return self.adaln_offset + condition
        return self.adaln(condition).view(len(condition), 1, 6, -1)

    def forward(
        self,
        x_BLC: Tensor,
        modulation_B16C: Tensor,
        scale_index_L: Tensor,
        bounds: Sequence[tuple[int, int]],
        branch_scale_2B: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, RoutingStatistics | None]:
        """Maps (B, L, C) to (B, L, C). A MoE block also returns its routing statistics, a dense block None.

        `branch_scale_2B` holds the factor of the attention branch and of the FFN branch of each sample: 0 or 1 / keep
        (stochastic depth).
        """
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation_B16C.unbind(2)
        branch = self.attention(modulate(x_BLC, scale1, shift1), bounds, cache)
        x_BLC = torch.addcmul(x_BLC, branch, _scaled(gamma1, branch_scale_2B, 0))
        normed = modulate(x_BLC, scale2, shift2)
        statistics = None
        if isinstance(self.ffn, MoEFeedForward):
            branch, statistics = self.ffn(normed, scale_index_L)
        else:
            branch = self.ffn(normed)
        return torch.addcmul(x_BLC, branch, _scaled(gamma2, branch_scale_2B, 1)), statistics


BlockRunner = Callable[[nn.Module, Tensor, Tensor, Tensor, KVCache], Tensor]
"""What runs a block in sampling: `run_scale_of`, or that compiled."""


def run_scale_of(block: nn.Module, x_BlC: Tensor, modulation: Tensor, scale_index_l: Tensor, cache: KVCache) -> Tensor:
    """Runs a block on the tokens of one scale. The cache holds the scales before it, and afterwards this one too."""
    x_BlC, _ = block(x_BlC, modulation, scale_index_l, (), cache=cache)
    return x_BlC


def modulate(x_BLC: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalises each position (LayerNorm without weights), then applies the class's scale and shift (AdaLN)."""
    return torch.addcmul(shift, F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=LAYER_NORM_EPS), 1 + scale)


def _scaled(gamma_B1C: Tensor, branch_scale_2B: Tensor | None, branch: int) -> Tensor:
    """The gate of a branch (0 attention, 1 FFN) times its factor of stochastic depth: (B, 1, C)."""
    if branch_scale_2B is None:
        return gamma_B1C
    return gamma_B1C * branch_scale_2B[branch].to(gamma_B1C.dtype)[:, None, None]
