"""Routers: they choose the experts of each token, and their weights.

Shapes: B batch, L positions, T = B L tokens, C width, S scales, E experts, K choices a token.
Routing is computed in fp32, whatever the model's type (docs/decisions.md, fp32 where it decides).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mepa_ds.config.model import MoEConfig


@dataclass
class Routing:
    """The decision of one layer for T tokens.

    `expert_index_TK` and `weight_TK` list the choices of each token. A choice whose `kept_TK` is False is not
    dispatched (a capacity limit, expert choice); `kept_TK` is None when all choices are kept.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    expert_index_TK: Tensor
    weight_TK: Tensor
    kept_TK: Tensor | None = None
    choices_are_fixed: bool = True
    """Whether every token chose K experts, so that a choice that is not kept was dropped. False for expert choice."""


class Router(nn.Module):
    """A top-K router in which tokens choose experts. Subclasses compute the logits from different inputs.

    S = softmax(logits) over the experts. Each token goes to the K experts with the largest S, with the weight S (MEPA's
    STMoE), or S / sum_K S with `renormalize`. In training, `capacity_factor` limits the tokens of an expert.
    `bias_rate` > 0 turns on loss-free balancing, which adds a bias to S for the choice alone, not for the weight.
    """

    # The bias in whole steps: an integer stays exact when the engine casts floating point buffers to bf16.
    bias_steps_E: Tensor

    def __init__(self, width: int, num_scales: int, config: MoEConfig):
        super().__init__()
        self.top_k = config.top_k
        self.renormalize = config.renormalize
        self.capacity_factor = config.capacity_factor
        self.bias_rate = config.bias_rate
        if self.bias_rate:
            self.register_buffer("bias_steps_E", torch.zeros(config.num_experts, dtype=torch.int64))

    def logits(self, x_TC: Tensor, scale_index_L: Tensor) -> Tensor:
        """The router logits of each token: (T, C) and (L,) -> (T, E) in fp32."""
        raise NotImplementedError

    def forward(self, x_TC: Tensor, scale_index_L: Tensor) -> Routing:
        """Routes T = B L tokens (T, C), image after image, given the 0-based scale of each position (L,)."""
        logits_TE = self.logits(x_TC, scale_index_L)
        probs_TE = logits_TE.softmax(-1)
        if self.bias_rate:
            biased_TE = probs_TE + self.bias_rate * self.bias_steps_E
            expert_index_TK = biased_TE.topk(self.top_k, dim=-1).indices
        else:
            # Logits have the same order as probabilities, and differ where probabilities round to the same number.
            expert_index_TK = logits_TE.topk(self.top_k, dim=-1).indices
        weight_TK = probs_TE.gather(-1, expert_index_TK)
        if self.renormalize:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        kept_TK = None
        if self.capacity_factor is not None and self.training:
            num_tokens, num_experts = probs_TE.shape
            capacity = math.ceil(self.capacity_factor * num_tokens * self.top_k / num_experts)
            kept_TK = within_capacity(expert_index_TK, weight_TK.detach(), num_experts, capacity)
        return Routing(logits_TE, probs_TE, expert_index_TK, weight_TK, kept_TK)

    @torch.no_grad()
    def update_bias(self, counts_E: Tensor) -> None:
        """Loss-free balancing (arXiv 2408.15664): moves the bias of each expert by one step, up if it had few tokens.

        `counts_E` holds the (token, choice) pairs of each expert in the last step, over all ranks and micro-batches.
        """
        if self.bias_rate:
            self.bias_steps_E += torch.sign(counts_E.mean() - counts_E).to(torch.int64)


def within_capacity(expert_index_TK: Tensor, weight_TK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Which (token, choice) pairs a capacity limit keeps: (T, K) bool.

    Each expert keeps its `capacity` pairs of largest weight; of equal weights, those of earlier tokens.
    """
    expert_R = expert_index_TK.flatten()
    by_weight_R = weight_TK.flatten().sort(descending=True, stable=True).indices
    sorted_R, within_R = expert_R[by_weight_R].sort(stable=True)
    start_E = torch.searchsorted(sorted_R, torch.arange(num_experts, device=sorted_R.device))
    rank_R = torch.arange(len(sorted_R), device=sorted_R.device) - start_E[sorted_R]
    kept_R = torch.empty_like(expert_R, dtype=torch.bool)
    kept_R[by_weight_R[within_R]] = rank_R < capacity
    return kept_R.view_as(expert_index_TK)


class TokenRouter(Router):
    """Token routing: logits x W. The scale embedding reaches this router only through the residual stream."""

    def __init__(self, width: int, num_scales: int, config: MoEConfig):
        super().__init__(width, num_scales, config)
        self.gate = nn.Linear(width, config.num_experts, bias=False)

    def logits(self, x_TC: Tensor, scale_index_L: Tensor) -> Tensor:
        return F.linear(x_TC.float(), self.gate.weight.float())


def of_scale(table_SE: Tensor, scale_index_L: Tensor) -> Tensor:
    """The row of `table_SE` for each position's scale: (L, E) in fp32.

    It is a product with one-hot rows. Indexing would, on a GPU, add the gradients of a scale's many positions one by
    one.
    """
    return F.one_hot(scale_index_L, len(table_SE)).float() @ table_SE.float()


class ScaleTokenRouter(TokenRouter):
    """STMoE: logits (x + SE(scale)) W = x W + SE(scale) W.

    The scale embedding SE acts through its (S, E) product with W alone, so this router learns that product. It is the
    same family of routers, with S E parameters in place of S C, and without a sum of (T, C) tensors.
    """

    def __init__(self, width: int, num_scales: int, config: MoEConfig):
        super().__init__(width, num_scales, config)
        self.scale_logits_SE = nn.Parameter(torch.empty(num_scales, config.num_experts))

    def logits(self, x_TC: Tensor, scale_index_L: Tensor) -> Tensor:
        logits_BLE = super().logits(x_TC, scale_index_L).unflatten(0, (-1, len(scale_index_L)))
        return (logits_BLE + of_scale(self.scale_logits_SE, scale_index_L)).flatten(0, 1)


class ScaleRouter(Router):
    """SMoE: logits SE(scale) W, so all tokens of a scale share one choice. ScaleTokenRouter explains the product."""

    def __init__(self, width: int, num_scales: int, config: MoEConfig):
        super().__init__(width, num_scales, config)
        self.scale_logits_SE = nn.Parameter(torch.empty(num_scales, config.num_experts))

    def logits(self, x_TC: Tensor, scale_index_L: Tensor) -> Tensor:
        return of_scale(self.scale_logits_SE, scale_index_L).repeat(len(x_TC) // len(scale_index_L), 1)


class ExpertChoiceRouter(ScaleTokenRouter):
    """Experts choose tokens (arXiv 2202.09368): each takes the T K / E tokens of a call that have its largest S.

    It is meant for the ablation only. The experts of a token depend on all other tokens of the call, also on finer
    scales and other images. So training is not causal, the result depends on how a batch is split into ranks and
    micro-batches, and sampling, with one scale a call, chooses among other tokens than training did.
    """

    def forward(self, x_TC: Tensor, scale_index_L: Tensor) -> Routing:
        logits_TE = self.logits(x_TC, scale_index_L)
        probs_TE = logits_TE.softmax(-1)
        num_tokens, num_experts = probs_TE.shape
        capacity = min(num_tokens, math.ceil(num_tokens * self.top_k / num_experts))
        chosen_EN = probs_TE.detach().T.topk(capacity, dim=-1).indices
        kept_TE = torch.zeros_like(probs_TE, dtype=torch.bool).T.scatter(1, chosen_EN, True).T
        # Each token lists all E experts as its choices. Those that did not choose the token are not kept.
        expert_index_TE = torch.arange(num_experts, device=x_TC.device).expand(num_tokens, -1)
        return Routing(logits_TE, probs_TE, expert_index_TE, probs_TE, kept_TE, choices_are_fixed=False)


ROUTERS: dict[str, type[Router]] = {
    "stmoe": ScaleTokenRouter,
    "smoe": ScaleRouter,
    "token": TokenRouter,
    "expert_choice": ExpertChoiceRouter,
}


@dataclass
class RoutingStatistics:
    """Statistics of one MoE layer's forward pass, as sums over its tokens, for each scale (S) and expert (E).

    `prob_sum_SE` carries the gradient of the balance loss, and `z_sum_S` that of the router z-loss; the rest is
    detached. Sums of micro-batches and ranks are added before any ratio is formed.
    """

    counts_SE: Tensor
    """(token, choice) pairs that the router chose, before a capacity limit drops some: the load to be balanced."""
    prob_sum_SE: Tensor
    """Sum over tokens of the router probabilities."""
    entropy_sum_S: Tensor
    """Sum over tokens of the entropy of the router probabilities, in nats."""
    z_sum_S: Tensor
    """Sum over tokens of logsumexp(logits)^2 (router z-loss, arXiv 2202.08906)."""
    dropped_S: Tensor
    """Chosen pairs that a capacity limit dropped."""
    tokens_S: Tensor
    """Number of tokens."""

    def detached(self) -> RoutingStatistics:
        """A copy that is detached from the graph."""
        return RoutingStatistics(**{field.name: getattr(self, field.name).detach() for field in fields(self)})

    @classmethod
    def of(cls, routing: Routing, scale_index_L: Tensor, num_scales: int) -> RoutingStatistics:
        """Sums up a routing of T = B L tokens, image after image, given the scale of each position (L,)."""
        ones_TK = torch.ones_like(routing.weight_TK).detach()
        kept_TK = ones_TK if routing.kept_TK is None else routing.kept_TK.float()
        chosen_TK = ones_TK if routing.choices_are_fixed else kept_TK
        chosen_TE = torch.zeros_like(routing.probs_TE).detach().scatter_add_(1, routing.expert_index_TK, chosen_TK)
        log_probs_TE = routing.probs_TE.detach().clamp_min(1e-30).log()
        entropy_T = -(routing.probs_TE.detach() * log_probs_TE).sum(-1, keepdim=True)
        z_T = routing.logits_TE.logsumexp(-1, keepdim=True).square()
        dropped_T = (chosen_TK - kept_TK).sum(-1, keepdim=True)
        # All sums at once, over images and then over the positions of a scale. A product with one-hot rows is
        # deterministic, and needs no host sync, which bincount needs on a GPU.
        parts = [chosen_TE, routing.probs_TE, entropy_T, z_T, dropped_T, torch.ones_like(z_T).detach()]
        sums_L = torch.cat(parts, dim=1).unflatten(0, (-1, len(scale_index_L))).sum(0)
        sums_S = F.one_hot(scale_index_L, num_scales).float().T @ sums_L
        counts, probs, *others = sums_S.split([part.shape[1] for part in parts], dim=1)
        entropy_S, z_S, dropped_S, tokens_S = (other[:, 0] for other in others)
        return cls(counts.detach(), probs, entropy_S.detach(), z_S, dropped_S.detach(), tokens_S.detach())
