"""From sums on ranks to the numbers in metrics.jsonl.

Shapes: S scales, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from mepa_ds import distributed
from mepa_ds.models.moe.routing import RoutingStatistics
from mepa_ds.objective.objective import Losses, ScaleScores

SumsT = TypeVar("SumsT", RoutingStatistics, ScaleScores)


def add_up(items: Sequence[SumsT]) -> SumsT:
    """Adds dataclasses of sums field by field, without gradient."""
    kind = type(items[0])
    sums = {f.name: sum(getattr(item, f.name).detach() for item in items) for f in fields(kind)}
    return kind(**sums)


def reduce_losses(
    micro_batches: Sequence[Losses],
) -> tuple[dict[str, float], ScaleScores, dict[int, RoutingStatistics]]:
    """One step's losses over micro-batches and ranks: mean terms, summed scores, summed routing. Collective."""
    names = list(micro_batches[0].terms)
    stacked = [torch.stack([losses.terms[name].float() for name in names]) for losses in micro_batches]
    terms = torch.stack(stacked).mean(0)
    sums: list[Any] = [add_up([losses.scores for losses in micro_batches])]
    layers = list(micro_batches[0].routing)
    sums += [add_up([losses.routing[layer] for losses in micro_batches]) for layer in layers]
    tensors = [terms] + [getattr(item, f.name) for item in sums for f in fields(item)]
    reduced = iter(distributed.sums_over_ranks(tensors))
    mean_terms = next(reduced) / distributed.world_size()
    scores, *routing = [type(item)(**{f.name: next(reduced) for f in fields(item)}) for item in sums]
    return dict(zip(names, mean_terms.tolist(), strict=True)), scores, dict(zip(layers, routing, strict=True))


def any_nonfinite(micro_batches: Sequence[Losses]) -> bool:
    """Whether a loss of this step is not finite on any rank: the same answer on all. Collective."""
    lost = torch.stack([~losses.total.detach().isfinite() for losses in micro_batches]).any()
    return bool(distributed.sums_over_ranks([lost.float()])[0] > 0)


def score_report(scores: ScaleScores) -> dict[str, Any]:
    """Cross-entropy in nats a token and top-1 accuracy: mean over all tokens, of the last scale, and of every scale.

    NaN for scales without tokens (train.progressive).
    """
    ce_S = scores.ce_sum_S / scores.tokens_S
    accuracy_S = scores.correct_S / scores.tokens_S
    tokens = scores.tokens_S.sum()
    return {
        "ce": (scores.ce_sum_S.sum() / tokens).item(),
        "ce_last": ce_S[-1].item(),
        "ce_scale": ce_S.tolist(),
        "accuracy": (scores.correct_S.sum() / tokens).item(),
        "accuracy_last": accuracy_S[-1].item(),
        "accuracy_scale": accuracy_S.tolist(),
    }


def routing_report(statistics: RoutingStatistics) -> dict[str, Any]:
    """One MoE layer: per scale the experts' load and mean probability (shares that sum to 1), entropy (nats), variance
    of the load in percent over experts (0 when even), dropped share of routed pairs; and the load over all scales.
    Loads count what the router chose, dropped pairs included.
    """
    counts_SE, tokens_S = statistics.counts_SE, statistics.tokens_S
    load_SE = counts_SE / counts_SE.sum(-1, keepdim=True).clamp_min(1)
    return {
        "load": _rounded(counts_SE.sum(0) / counts_SE.sum().clamp_min(1)),
        "load_scale": _rounded(load_SE),
        "probability_scale": _rounded(statistics.prob_sum_SE / tokens_S[:, None].clamp_min(1)),
        "entropy_scale": _rounded(statistics.entropy_sum_S / tokens_S.clamp_min(1)),
        "load_variance_scale": _rounded((100 * load_SE).var(-1, unbiased=False)),
        "dropped_scale": _rounded(statistics.dropped_S / counts_SE.sum(-1).clamp_min(1)),
    }


def _rounded(tensor: Tensor) -> Any:
    return torch.round(tensor, decimals=5).tolist()
