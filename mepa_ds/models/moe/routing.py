"""Routers: which experts see a token, with what weight.

Shapes: B batch, L positions, T = B L tokens, C width, S scales, E experts, K choices a token.
All routing is fp32, whatever the model's type (docs/decisions.md, fp32 where it decides).
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
    """One layer's decision for T tokens.

    `expert_index_TK` and `weight_TK` list each token's choices; those that `kept_TK` denies (capacity limits, expert
    choice) are not dispatched. It is None when every choice is kept.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    expert_index_TK: Tensor
    weight_TK: Tensor
    kept_TK: Tensor | None = None
    choices_are_fixed: bool = True
    """Every token asked for K experts, so a pair that is not kept was dropped (False: expert choice)."""


class Router(nn.Module):
    """Token-choice top-K router; subclasses differ in what the logits see.

    S = softmax_E(...); each token goes to the K experts of largest S, weighted by S itself (MEPA's STMoE), or by
    S / sum_K S with `renormalize`. In training, `capacity_factor` bounds what an expert takes and `bias_rate` > 0
    turns on loss-free balancing: a bias is added to S for the choice alone, never for the weight.
    """

    # Whole steps, up or down: stays exact when the engine casts floating point buffers to bf16.
    bias_steps_E: Tensor

    def __init__(self, width: int, num_scales: int, config: MoEConfig):
        super().__init__()
        self.top_k = config.top_k
        self.renormalize = config.renormalize
        self.capacity_factor = config.capacity_factor
        self.bias_rate = config.bias_rate
        if self.bias_rate:
            self.register_buffer("bias_steps_E", torch.zeros(config.num_experts, dtype=torch.int64))

    def logits(self, x_TC: Tensor, scale_index_T: Tensor) -> Tensor:
        """(T, E) fp32 router logits."""
        raise NotImplementedError

    def forward(self, x_TC: Tensor, scale_index_T: Tensor) -> Routing:
        logits_TE = self.logits(x_TC, scale_index_T)
        probs_TE = logits_TE.softmax(-1)
        if self.bias_rate:
            biased_TE = probs_TE + self.bias_rate * self.bias_steps_E
            expert_index_TK = biased_TE.topk(self.top_k, dim=-1).indices
        else:
            # Logits have the order of probabilities, and tell apart what rounds to one probability.
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
        """Loss-free balancing (arXiv 2408.15664): one step up for underloaded experts, one down for overloaded ones.

        counts_E: pairs that chose each expert in the last step, over all ranks and micro-batches.
        """
        if self.bias_rate:
            self.bias_steps_E += torch.sign(counts_E.mean() - counts_E).to(torch.int64)


def within_capacity(expert_index_TK: Tensor, weight_TK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """(T, K) bool: each expert's `capacity` (token, choice) pairs of largest weight, earlier tokens first."""
    expert_R = expert_index_TK.flatten()
    by_weight_R = weight_TK.flatten().sort(descending=True, stable=True).indices
    sorted_R, within_R = expert_R[by_weight_R].sort(stable=True)
    start_E = torch.searchsorted(sorted_R, torch.arange(num_experts, device=sorted_R.device))
    rank_R = torch.arange(len(sorted_R), device=sorted_R.device) - start_E[sorted_R]
    kept_R = torch.empty_like(expert_R, dtype=torch.bool)
    kept_R[by_weight_R[within_R]] = rank_R < capacity
    return kept_R.view_as(expert_index_TK)


class TokenRouter(Router):
    """Plain token routing: x W. (The level embedding still reaches it through the residual stream.)"""

    def __init__(self, width: int, num_scales: int, config: MoEConfig):
        super().__init__(width, num_scales, config)
        self.gate = nn.Linear(width, config.num_experts, bias=False)

    def logits(self, x_TC: Tensor, scale_index_T: Tensor) -> Tensor:
        return F.linear(x_TC.float(), self.gate.weight.float())


def of_scale(table_SE: Tensor, scale_index_T: Tensor) -> Tensor:
    """(T, E) fp32: the table's row of each token's scale.

    A product with one-hot rows: indexing would, on a GPU, add the gradients of a scale's many tokens one by one.
    """
    return F.one_hot(scale_index_T, len(table_SE)).float() @ table_SE.float()


class ScaleTokenRouter(TokenRouter):
    """STMoE: (x + SE(scale)) W = x W + SE(scale) W.

    The scale embedding SE enters through its S x E product with W alone, so that product is what is learned: the
    same family of routers with S E parameters in place of S C, and no T x C sum.
    """

    def __init__(self, width: int, num_scales: int, config: MoEConfig):
        super().__init__(width, num_scales, config)
        self.scale_logits_SE = nn.Parameter(torch.empty(num_scales, config.num_experts))

    def logits(self, x_TC: Tensor, scale_index_T: Tensor) -> Tensor:
        return super().logits(x_TC, scale_index_T) + of_scale(self.scale_logits_SE, scale_index_T)


class ScaleRouter(Router):
    """SMoE: all tokens of a scale share one choice, softmax(SE(scale) W); see ScaleTokenRouter for the product."""

    def __init__(self, width: int, num_scales: int, config: MoEConfig):
        super().__init__(width, num_scales, config)
        self.scale_logits_SE = nn.Parameter(torch.empty(num_scales, config.num_experts))

    def logits(self, x_TC: Tensor, scale_index_T: Tensor) -> Tensor:
        return of_scale(self.scale_logits_SE, scale_index_T)


class ExpertChoiceRouter(ScaleTokenRouter):
    """Experts choose tokens (arXiv 2202.09368): each takes the T K / E tokens of this call with the largest S.

    For the ablation only. A token's experts depend on all other tokens of the call, finer scales and other images
    among them: training is not causal, the result depends on how a batch is cut into ranks and micro-batches, and
    sampling (one scale a call) chooses among other tokens than training did.
    """

    def forward(self, x_TC: Tensor, scale_index_T: Tensor) -> Routing:
        logits_TE = self.logits(x_TC, scale_index_T)
        probs_TE = logits_TE.softmax(-1)
        num_tokens, num_experts = probs_TE.shape
        capacity = min(num_tokens, math.ceil(num_tokens * self.top_k / num_experts))
        chosen_EN = probs_TE.detach().T.topk(capacity, dim=-1).indices
        kept_TE = torch.zeros_like(probs_TE, dtype=torch.bool).T.scatter(1, chosen_EN, True).T
        # All E experts stand as a token's choices; the ones that did not choose it are not dispatched.
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
    """What one MoE layer reports about a forward pass, summed over its tokens, per scale (S) and expert (E).

    `prob_sum_SE` carries the gradient of the balance loss; everything else is detached. Sums add up over
    micro-batches and ranks; ratios are formed last.
    """

    counts_SE: Tensor
    """(token, choice) pairs as the router chose them, before a capacity limit drops some: what balancing is about."""
    prob_sum_SE: Tensor
    """Sum of router probabilities over tokens."""
    entropy_sum_S: Tensor
    """Sum of the routing distribution's entropy in nats over tokens."""
    z_sum_S: Tensor
    """Sum of logsumexp(logits)^2 over tokens, with gradient (router z-loss, arXiv 2202.08906)."""
    dropped_S: Tensor
    """Chosen pairs that a capacity limit dropped."""
    tokens_S: Tensor
    """Tokens."""

    def detached(self) -> RoutingStatistics:
        """Without the graph."""
        return RoutingStatistics(**{field.name: getattr(self, field.name).detach() for field in fields(self)})

    @classmethod
    def of(cls, routing: Routing, scale_index_T: Tensor, num_scales: int) -> RoutingStatistics:
        # Matrix products with one-hot rows: deterministic, and no host sync as bincount would have on a GPU.
        scale_TS = F.one_hot(scale_index_T, num_scales).float()
        ones_TK = torch.ones_like(routing.weight_TK).detach()
        kept_TK = ones_TK if routing.kept_TK is None else routing.kept_TK.float()
        chosen_TK = ones_TK if routing.choices_are_fixed else kept_TK
        chosen_TE = torch.zeros_like(routing.probs_TE).detach().scatter_add_(1, routing.expert_index_TK, chosen_TK)
        log_probs_TE = routing.probs_TE.detach().clamp_min(1e-30).log()
        entropy_T = -(routing.probs_TE.detach() * log_probs_TE).sum(-1)
        z_T = routing.logits_TE.logsumexp(-1).square()
        return cls(
            counts_SE=scale_TS.T @ chosen_TE,
            prob_sum_SE=scale_TS.T @ routing.probs_TE,
            entropy_sum_S=scale_TS.T @ entropy_T,
            z_sum_S=scale_TS.T @ z_T,
            dropped_S=scale_TS.T @ (chosen_TK - kept_TK).sum(-1),
            tokens_S=scale_TS.sum(0),
        )
