"""From sums to the numbers of metrics.jsonl, by hand; `sum_over_ranks` itself is tested on ranks (tests/engine)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mepa_ds.models.moe.routing import RoutingStatistics
from mepa_ds.objective.objective import Losses, ScaleScores, nonfinite_routers
from mepa_ds.objective.reports import any_nonfinite, reduce_losses, score_report


def routing(first: float) -> RoutingStatistics:
    """Two scales, two experts."""
    counts, probs = torch.tensor([[first, 1.0], [2.0, 2.0]]), torch.tensor([[0.5, 0.5], [1.0, 3.0]])
    return RoutingStatistics(
        counts, probs, torch.ones(2), torch.full((2,), 4.0), torch.zeros(2), torch.tensor([1.0, 4])
    )


def losses(ce: float, balance: float, first: float) -> Losses:
    scores = ScaleScores(torch.tensor([ce, 2 * ce]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 4.0]))
    terms = {"ce": torch.tensor(ce), "balance": torch.tensor(balance)}
    counts_NE = torch.tensor([[first + 2, 3.0], [4.0, 4.0]])
    return Losses(torch.tensor(ce + balance), terms, scores, {1: routing(first), 3: routing(1.0)}, counts_NE)


def test_micro_batches_of_a_step_are_joined() -> None:
    """Terms are means, everything else is a sum."""
    terms, scores, layers = reduce_losses([losses(2.0, 0.5, 7.0), losses(4.0, 1.5, 3.0)])
    assert terms == {"ce": 3.0, "balance": 1.0}
    assert scores.ce_sum_S.tolist() == [6.0, 12.0]
    assert scores.correct_S.tolist() == [2.0, 0.0]
    assert scores.tokens_S.tolist() == [2.0, 8.0]
    assert list(layers) == [1, 3]
    assert layers[1].counts_SE.tolist() == [[10.0, 2.0], [4.0, 4.0]]
    assert layers[3].counts_SE.tolist() == [[2.0, 2.0], [4.0, 4.0]]
    assert layers[1].prob_sum_SE.tolist() == [[1.0, 1.0], [2.0, 6.0]]


def test_scores_are_means_over_tokens_and_scales_without_tokens_have_none() -> None:
    scores = ScaleScores(torch.tensor([3.0, 8.0, 0.0]), torch.tensor([1.0, 3.0, 0.0]), torch.tensor([2.0, 8.0, 0.0]))
    report = score_report(scores)
    assert report["ce"] == pytest.approx(11 / 10)  # not the mean of the scales' means
    assert report["accuracy"] == pytest.approx(4 / 10)
    assert report["ce_scale"][:2] == [1.5, 1.0]
    assert report["accuracy_scale"][:2] == [0.5, 0.375]
    assert all(math.isnan(report[key]) for key in ("ce_last", "accuracy_last"))
    assert math.isnan(report["ce_scale"][2])


def test_one_micro_batch_that_is_not_finite_loses_the_step_and_its_router_is_named() -> None:
    good = losses(2.0, 0.5, 7.0)
    assert not any_nonfinite([good, good])
    assert nonfinite_routers([good, good]) == []
    assert good.counts_NE is not None
    bad_counts = good.counts_NE.clone()
    bad_counts[1] = math.nan
    bad = replace(good, total=torch.tensor(math.inf), counts_NE=bad_counts)
    assert any_nonfinite([good, bad])
    assert nonfinite_routers([good, bad]) == [3], "the block, not the place among the layers"
    assert nonfinite_routers([replace(good, routing={}, counts_NE=None)]) == [], "a dense model has none"


def test_detached_losses_keep_their_numbers_and_no_graph() -> None:
    graph = torch.ones((), requires_grad=True)
    whole = losses(2.0, 0.5, 7.0)
    statistics = replace(whole.routing[1], prob_sum_SE=whole.routing[1].prob_sum_SE * graph)
    whole = replace(whole, total=whole.total * graph, routing={1: statistics})
    free = whole.detached()
    assert free.total.item() == 2.5
    assert not free.total.requires_grad
    assert not free.routing[1].prob_sum_SE.requires_grad
    torch.testing.assert_close(free.routing[1].prob_sum_SE, statistics.prob_sum_SE.detach())
    assert whole.total.requires_grad
