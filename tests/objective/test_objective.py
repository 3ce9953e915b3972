"""Losses against their formulas, written out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mepa_ds.config.model import SCALES_256
from mepa_ds.config.objective import AlignmentConfig, ObjectiveConfig
from mepa_ds.models.moe.routing import Routing, RoutingStatistics
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.alignment import alignment_loss
from mepa_ds.objective.balance import balance_loss, router_z_loss
from mepa_ds.objective.objective import ModelInputs, PretrainingObjective
from mepa_ds.objective.reports import routing_report
from mepa_ds.scales import ScaleSchedule

SCHEDULE = ScaleSchedule.of((1, 2, 3, 4))


def test_alignment_is_the_cosine_of_aggregates_over_channels() -> None:
    torch.manual_seed(0)
    B, G, P, chosen = 2, 4, 5, (2, 4)
    z_BLP, teacher_BNP = torch.randn(B, SCHEDULE.num_tokens, P), torch.randn(B, G * G, P)
    total = 0.0
    for b in range(B):
        aggregate = torch.zeros(P, G, G)
        for j, (side, (start, end)) in enumerate(zip(SCHEDULE.sides, SCHEDULE.bounds, strict=True), start=1):
            token_map = z_BLP[b, start:end].T.reshape(1, P, side, side)
            aggregate = aggregate + F.interpolate(token_map, size=(G, G), mode="bicubic")[0]
            if j in chosen:
                for row in range(G):
                    for column in range(G):
                        g, z = teacher_BNP[b, row * G + column], aggregate[:, row, column]
                        total += (g @ z / (g.norm() * z.norm())).item()
    expected = -total / (B * G * G)
    assert alignment_loss(z_BLP, teacher_BNP, SCHEDULE, chosen).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("scales", [(1,), (5, 6, 7), (7, 5, 6), (2, 10)])
def test_guidance_by_matrices_equals_interpolation(scales: tuple[int, ...]) -> None:
    """Loss and gradient at VAR's scales; the gradient to 1e-5 of its largest value."""
    schedule, grid = ScaleSchedule.of(SCALES_256), 16
    torch.manual_seed(0)
    z_BLP = torch.randn(2, schedule.bounds[max(scales) - 1][1], 24, requires_grad=True)
    teacher_BNP = torch.randn(2, grid * grid, 24)
    total, expected = torch.zeros(2, 24, grid, grid), torch.zeros(())
    for scale, (side, (start, end)) in enumerate(zip(schedule.sides, schedule.bounds, strict=True), start=1):
        if scale <= max(scales):
            map_BPss = z_BLP[:, start:end].transpose(1, 2).unflatten(2, (side, side))
            if side != grid:
                map_BPss = F.interpolate(map_BPss, size=(grid, grid), mode="bicubic")
            total = total + map_BPss
        if scale in scales:
            expected = expected - F.cosine_similarity(total.flatten(2).transpose(1, 2), teacher_BNP, dim=-1).mean()
    loss = alignment_loss(z_BLP, teacher_BNP, schedule, scales)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    (found,), (wanted,) = torch.autograd.grad(loss, z_BLP), torch.autograd.grad(expected, z_BLP)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_alignment_range_and_scale_invariance() -> None:
    z_BLP = torch.zeros(1, SCHEDULE.num_tokens, 3)
    z_BLP[:, 0] = torch.tensor([1.0, 2.0, 3.0])  # the first scale alone makes a constant map
    teacher = torch.tensor([10.0, 20.0, 30.0]).expand(1, 16, 3)
    assert alignment_loss(z_BLP, teacher, SCHEDULE, (1, 2)).item() == pytest.approx(-2, abs=1e-6)
    assert alignment_loss(-0.01 * z_BLP, teacher, SCHEDULE, (1, 2)).item() == pytest.approx(2, abs=1e-6)


def test_alignment_is_finite_for_half_precision_and_zeros() -> None:
    z_BLP = torch.zeros(1, SCHEDULE.num_tokens, 3, dtype=torch.float16, requires_grad=True)
    loss = alignment_loss(z_BLP, 6e4 * torch.ones(1, 16, 3, dtype=torch.float16), SCHEDULE, (3,))
    loss.backward()
    assert torch.isfinite(loss)
    assert z_BLP.grad is not None
    assert torch.isfinite(z_BLP.grad).all()


def statistics(counts_SE: list[list[float]], prob_SE: list[list[float]]) -> RoutingStatistics:
    counts, probs = torch.tensor(counts_SE), torch.tensor(prob_SE)
    tokens_S = probs.sum(-1)
    zeros = torch.zeros_like(tokens_S)
    return RoutingStatistics(counts, probs, zeros, 4.0 * tokens_S, zeros, tokens_S)


def test_balance_loss_formula() -> None:
    even = statistics([[4.0, 4.0], [8.0, 8.0]], [[4.0, 4.0], [8.0, 8.0]])
    skewed = statistics([[8.0, 0.0], [16.0, 0.0]], [[8.0, 0.0], [16.0, 0.0]])
    uneven = statistics([[6.0, 2.0]], [[5.0, 3.0]])
    expected = [1.0, 2.0, 2 * (0.75 * 5 / 8 + 0.25 * 3 / 8)]
    for layer, value in zip((even, skewed, uneven), expected, strict=True):
        assert balance_loss([layer], layer.counts_SE.sum(0)[None]).tolist() == pytest.approx([value])
    assert router_z_loss([even]).tolist() == pytest.approx([4.0])


def test_balance_loss_takes_global_counts_and_local_probabilities() -> None:
    """Mean of two ranks' losses = the loss of both ranks' tokens together."""
    ranks = [statistics([[6.0, 2.0]], [[5.0, 3.0]]), statistics([[1.0, 7.0]], [[2.0, 6.0]])]
    everything = statistics([[7.0, 9.0]], [[7.0, 9.0]])
    total = everything.counts_SE.sum(0)[None]
    per_rank = [balance_loss([rank], total).item() for rank in ranks]
    assert sum(per_rank) / 2 == pytest.approx(balance_loss([everything], total).item())


def test_routing_report_by_hand() -> None:
    """Two scales of 2 and 4 tokens, three experts, two choices a token."""
    layer = RoutingStatistics(
        counts_SE=torch.tensor([[2.0, 2.0, 0.0], [6.0, 1.0, 1.0]]),
        prob_sum_SE=torch.tensor([[1.0, 0.8, 0.2], [2.0, 1.0, 1.0]]),
        entropy_sum_S=torch.tensor([2 * math.log(2), 4 * 0.5]),
        z_sum_S=torch.zeros(2),
        dropped_S=torch.tensor([0.0, 2.0]),
        tokens_S=torch.tensor([2.0, 4.0]),
    )
    report = routing_report(layer)
    assert report["load"] == pytest.approx([8 / 12, 3 / 12, 1 / 12], abs=1e-5)
    assert report["load_scale"][0] == pytest.approx([0.5, 0.5, 0.0], abs=1e-5)
    assert report["load_scale"][1] == pytest.approx([0.75, 0.125, 0.125], abs=1e-5)
    assert report["probability_scale"][0] == pytest.approx([0.5, 0.4, 0.1], abs=1e-5)
    assert report["probability_scale"][1] == pytest.approx([0.5, 0.25, 0.25], abs=1e-5)
    assert report["entropy_scale"] == pytest.approx([math.log(2), 0.5], abs=1e-5)
    # In percent: mean 100/3; (2 (50 - 100/3)^2 + (100/3)^2) / 3, and ((75 - 100/3)^2 + 2 (12.5 - 100/3)^2) / 3.
    assert report["load_variance_scale"] == pytest.approx([5000 / 9, 7812.5 / 9], rel=1e-5)
    assert report["dropped_scale"] == pytest.approx([0.0, 0.25], abs=1e-5)


def test_statistics_hold_the_entropy_of_the_routing_distribution() -> None:
    probs_TE = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5], [1.0, 0.0, 0.0]])
    index_TK, kept_TK = (
        torch.tensor([[0, 1], [2, 0], [0, 1]]),
        torch.tensor([[True, True], [True, False], [False, True]]),
    )
    routing = Routing(probs_TE.log(), probs_TE, index_TK, probs_TE.gather(1, index_TK), kept_TK)
    layer = RoutingStatistics.of(routing, torch.tensor([0, 1, 1]), 2)
    entropies = [-sum(p * math.log(p) for p in row if p) for row in probs_TE.tolist()]
    assert layer.entropy_sum_S.tolist() == pytest.approx([entropies[0], entropies[1] + entropies[2]])
    assert layer.counts_SE.tolist() == [[1, 1, 0], [2, 1, 1]]
    assert layer.dropped_S.tolist() == [0, 2]
    torch.testing.assert_close(layer.prob_sum_SE, torch.tensor([[0.7, 0.2, 0.1], [1.25, 0.25, 0.5]]))


def make_objective(**config: Any) -> tuple[PretrainingObjective, ModelInputs]:
    model = NextScaleTransformer.from_preset(
        "mepa-d2", width=32, num_heads=2, num_classes=3, scales=(1, 2, 3, 4), codebook_size=16, code_width=4
    )
    alignment = AlignmentConfig(scales=(2, 3), projector_hidden=16)
    objective = PretrainingObjective(model, ObjectiveConfig(alignment=alignment, **config), teacher_width=6)
    objective.init_weights(0)
    torch.manual_seed(1)
    inputs = ModelInputs(
        labels_B=torch.tensor([0, 2]),
        inputs_BLZ=torch.randn(2, 29, 4),
        tokens_BL=torch.randint(16, (2, 30)),
        features_BNP=torch.randn(2, 16, 6),
    )
    return objective, inputs


def test_total_is_the_weighted_sum_of_the_terms() -> None:
    objective, inputs = make_objective(ce_weight=2.0, balance_weight=0.1, router_z_weight=0.01)
    losses = objective(inputs)
    terms = {name: value.item() for name, value in losses.terms.items()}
    expected = 2 * terms["ce"] + 0.5 * terms["alignment"] + 2 * (0.1 * terms["balance"] + 0.01 * terms["router_z"])
    assert losses.total.item() == pytest.approx(expected, rel=1e-6)
    assert terms["total"] == pytest.approx(expected, rel=1e-6)


def test_balance_over_a_step_counts_earlier_micro_batches_once() -> None:
    """E sum_e f_e P_e, with f_e of all micro-batches so far and P_e of this one."""
    objective, inputs = make_objective()
    alone = objective(inputs)
    counts_NE = alone.counts_NE
    torch.manual_seed(2)
    earlier_NE = torch.randint(50, counts_NE.shape).float()
    losses = objective(replace(inputs, earlier_counts_NE=earlier_NE))
    expected = 0.0
    for layer, own_E, earlier_E in zip(alone.routing.values(), counts_NE, earlier_NE, strict=True):
        share_E = (own_E + earlier_E) / (own_E + earlier_E).sum()
        probability_E = layer.prob_sum_SE.sum(0) / layer.tokens_S.sum()
        expected += 8 * (share_E * probability_E).sum().item() / len(counts_NE)
    assert losses.terms["balance"].item() == pytest.approx(expected, rel=1e-6)
    assert losses.terms["balance"].item() != pytest.approx(alone.terms["balance"].item(), rel=1e-4)
    torch.testing.assert_close(losses.counts_NE, counts_NE)  # of this micro-batch alone


def test_scores_per_scale_add_up_to_the_mean() -> None:
    objective, inputs = make_objective()
    losses = objective(inputs)
    scores = losses.scores
    assert scores.tokens_S.tolist() == [2, 8, 18, 32]
    assert (scores.ce_sum_S.sum() / scores.tokens_S.sum()).item() == pytest.approx(losses.terms["ce"].item(), rel=1e-6)
    assert losses.terms["ce"].item() == pytest.approx(math.log(16), rel=0.05)  # a fresh model knows nothing


def test_guidance_waits_for_its_scales_without_missing_gradients() -> None:
    """train.progressive begins with the first scales alone, before any that is aligned: ZeRO wants all gradients."""
    objective, inputs = make_objective()
    first = replace(inputs, inputs_BLZ=inputs.inputs_BLZ[:, :0], tokens_BL=inputs.tokens_BL[:, :1])
    losses = objective(first)
    losses.total.backward()
    assert losses.terms["alignment"].item() == 0
    assert losses.scores.tokens_S.tolist() == [2, 0, 0, 0]
    assert objective.projector is not None
    for name, parameter in objective.projector.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_every_parameter_has_a_gradient() -> None:
    """Experts that saw no token included: ZeRO-2 relies on it."""
    objective, inputs = make_objective()
    objective(inputs).total.backward()
    assert [name for name, parameter in objective.named_parameters() if parameter.grad is None] == []
