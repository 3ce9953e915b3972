"""Losses that keep the experts in use.

Shapes: E experts, S scales. One entry of `routing` is one MoE layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mepa_ds.models.moe.routing import RoutingStatistics

ReduceCounts = Callable[[Tensor], Tensor]
"""Sums a tensor over all data-parallel ranks; the identity in one process."""


def global_counts(routing: Sequence[RoutingStatistics], reduce_counts: ReduceCounts) -> Tensor:
    """(N layers, E): routed pairs of each expert over all ranks, in one reduction for all layers.

    If the router logits of a layer are not finite on any rank, the layer has NaN here on every rank. So all ranks know,
    without another exchange, that the step is lost, and in which layer.
    """
    return reduce_counts(torch.stack([layer.counts_SE.sum(0) + 0 * layer.z_sum_S.detach().sum() for layer in routing]))


def balance_loss(routing: Sequence[RoutingStatistics], counts_NE: Tensor) -> Tensor:
    """L_b = E sum_e f_e P_e, one value a layer: (N,). 1 when the load is even, E when one expert has all.

    f_e is the share of routed pairs that went to e by `counts_NE`, which span *all* ranks, P_e the mean probability of
    e here: then the mean of the ranks' losses is the loss of the global batch, exactly.
    """
    probs_NE = torch.stack([layer.prob_sum_SE.sum(0) / layer.tokens_S.sum() for layer in routing])
    share_NE = counts_NE / counts_NE.sum(-1, keepdim=True)
    return share_NE.shape[1] * (share_NE * probs_NE).sum(-1)


def router_z_loss(routing: Sequence[RoutingStatistics]) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906 eq. 5), one value a layer: (num_layers,)."""
    return torch.stack([layer.z_sum_S.sum() / layer.tokens_S.sum() for layer in routing])
