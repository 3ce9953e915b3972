"""Semantic guidance for itself: aggregates, scale sets, what its gradient reaches, its strength, teachers' widths.

Legend: B images, L positions, P teacher width, G teacher cells along a side.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mepa_ds.config.base import load_config
from mepa_ds.config.objective import AlignmentConfig, ObjectiveConfig
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.alignment import aggregates, alignment_loss
from mepa_ds.objective.objective import ModelInputs, PretrainingObjective
from mepa_ds.runtime.schedule import guidance_strength
from mepa_ds.scales import ScaleSchedule

SIDES = (1, 2, 4, 8)
SCHEDULE = ScaleSchedule.of(SIDES)
SETS = [scales for count in range(1, 5) for scales in combinations((1, 2, 3, 4), count)]
"""All sets of four scales: (1, 2) is S, (2, 3) M and (4,) Last in the ablation."""


def naive_aggregate(z_BLP: Tensor, last: int, grid: int) -> Tensor:
    """(B, P, G, G): every map up to scale `last` enlarged by itself and added."""
    total, start = torch.zeros(len(z_BLP), z_BLP.shape[-1], grid, grid), 0
    for side in SIDES[:last]:
        map_BPss = z_BLP[:, start : start + side * side].transpose(1, 2).reshape(len(z_BLP), -1, side, side)
        total = total + F.interpolate(map_BPss, size=(grid, grid), mode="bicubic", align_corners=False)
        start += side * side
    return total


@pytest.mark.parametrize("grid", [3, 4, 8, 16])
def test_aggregates_are_sums_of_enlarged_maps(grid: int) -> None:
    """To 1e-5, on grids below, at and above the sides of the maps."""
    torch.manual_seed(0)
    z_BLP = torch.randn(2, SCHEDULE.num_tokens, 5)
    found = list(aggregates(z_BLP, SCHEDULE, grid, (4, 2)))
    for last, total_BNP in zip((2, 4), found, strict=True):
        expected = naive_aggregate(z_BLP, last, grid).flatten(2).transpose(1, 2)
        torch.testing.assert_close(total_BNP, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scales", SETS)
def test_any_set_of_scales(scales: tuple[int, ...]) -> None:
    """The loss is the negative sum of the sets' cosines; positions past the last aligned scale are not read."""
    torch.manual_seed(1)
    z_BLP, teacher_BNP = torch.randn(2, SCHEDULE.num_tokens, 5), torch.randn(2, 16, 5)
    expected = torch.zeros(())
    for last in scales:
        map_BNP = naive_aggregate(z_BLP, last, 4).flatten(2).transpose(1, 2)
        expected = expected - F.cosine_similarity(map_BNP, teacher_BNP, dim=-1).mean()
    assert alignment_loss(z_BLP, teacher_BNP, SCHEDULE, scales).item() == pytest.approx(expected.item(), abs=1e-5)
    unread_BLP = z_BLP.clone()
    unread_BLP[:, SCHEDULE.bounds[max(scales) - 1][1] :] = float("nan")
    assert alignment_loss(unread_BLP, teacher_BNP, SCHEDULE, scales).isfinite()


@pytest.mark.parametrize("width", [384, 768, 1024, 1536])
def test_widths_of_dinov2(width: int) -> None:
    """A projector of the teacher's width, and the loss of a naive projection: ViT-S, -B, -L and -g."""
    objective, inputs = made(teacher_width=width)
    projector = objective.projector
    assert projector is not None
    assert projector(torch.zeros(1, 32)).shape == (1, width)
    losses = objective(inputs)
    output = objective.transformer(inputs.labels_B, inputs.inputs_BLZ, hidden_after=objective.hidden_after)
    hidden = output.hidden_BLC
    assert hidden is not None
    assert inputs.features_BNP is not None
    parameters = dict(projector.named_parameters())
    for number in (0, 2, 4):
        hidden = (F.silu(hidden) if number else hidden) @ parameters[f"{number}.weight"].T + parameters[
            f"{number}.bias"
        ]
    expected = torch.zeros(())
    for last in (2, 3):
        map_BNP = naive_aggregate(hidden, last, 4).flatten(2).transpose(1, 2)
        expected = expected - F.cosine_similarity(map_BNP, inputs.features_BNP, dim=-1).mean()
    assert losses.terms["alignment"].item() == pytest.approx(expected.item(), abs=1e-5)


def made(teacher_width: int = 6, block: int = 1, **config: Any) -> tuple[PretrainingObjective, ModelInputs]:
    """A mixture model of four blocks, and a batch."""
    model = NextScaleTransformer.from_preset(
        "mepa-d4", width=32, num_heads=2, num_classes=3, scales=SIDES, codebook_size=16, code_width=4,
        adaln_gamma_init=0.5,  # at the presets' 1e-3 the blocks hardly change what passes through them
    )  # fmt: skip
    alignment = AlignmentConfig(scales=(2, 3), projector_hidden=16, block=block)
    objective = PretrainingObjective(model, ObjectiveConfig(alignment=alignment, **config), teacher_width)
    objective.init_weights(0)
    torch.manual_seed(1)
    tokens = SCHEDULE.num_tokens
    inputs = ModelInputs(
        labels_B=torch.tensor([0, 2]),
        inputs_BLZ=torch.randn(2, tokens - 1, 4),
        tokens_BL=torch.randint(16, (2, tokens)),
        features_BNP=torch.randn(2, 16, teacher_width),
    )
    return objective, inputs


@pytest.mark.parametrize("block", [0, 1, 3])
def test_the_gradient_reaches_the_blocks_up_to_the_tap(block: int) -> None:
    """And words, positions and classes before them, and the projector; later blocks and the head get exactly none."""
    objective, inputs = made(block=block, ce_weight=0.0, balance_weight=0.0)
    objective(inputs).total.backward()
    reached = {n for n, p in objective.named_parameters() if p.grad is not None and p.grad.any()}
    names = {name for name, _ in objective.named_parameters()}
    later = {
        name
        for name in names
        if name.startswith("transformer.head")
        or (name.startswith("transformer.blocks.") and int(name.split(".")[2]) > block)
    }
    assert later
    assert not reached & later
    # A router's scale embedding and an expert without tokens may get none: whole modules are asked.
    for index in range(block + 1):
        for part in ("attention", "ffn", "adaln"):
            prefix = f"transformer.blocks.{index}."
            assert any(name.startswith(prefix) and part in name for name in reached), (prefix, part)
    assert {name for name in names if name.startswith("projector.")} <= reached
    assert {name for name in names - later if "blocks" not in name and "projector" not in name} <= reached


def test_guidance_does_not_change_what_is_computed() -> None:
    """Cross-entropy, scores and routing are those of a model without it: it acts through gradients alone."""
    objective, inputs = made()
    with_guidance = objective(inputs)
    plain = PretrainingObjective(objective.transformer, ObjectiveConfig(alignment=None), None)
    without = plain(replace(inputs, features_BNP=None))
    assert torch.equal(with_guidance.terms["ce"], without.terms["ce"])
    assert torch.equal(with_guidance.counts_NE, without.counts_NE)


def test_strength_scales_the_gradient() -> None:
    """A quarter of the guidance is a quarter of its gradient; none of it is the gradient without it."""
    gradients: dict[float, dict[str, Tensor]] = {}
    for strength in (0.0, 0.25, 1.0):
        objective, inputs = made()
        objective(replace(inputs, guidance=strength)).total.backward()
        gradients[strength] = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
        assert gradients[strength].keys() == dict(objective.named_parameters()).keys(), "ZeRO wants all gradients"
    objective, inputs = made()
    plain = PretrainingObjective(objective.transformer, ObjectiveConfig(alignment=None), None)
    plain(inputs).total.backward()
    for name, gradient in gradients[0.0].items():
        expected = dict(plain.named_parameters())[name].grad if name.startswith("transformer.") else None
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if expected is None else expected)
        full, quarter = gradients[1.0][name] - gradient, gradients[0.25][name] - gradient
        torch.testing.assert_close(quarter, full / 4, rtol=1e-4, atol=1e-6)


def test_strength_over_the_steps() -> None:
    assert [guidance_strength(None, step, 10) for step in (0, 9)] == [1, 1]
    assert [guidance_strength(0.5, step, 8) for step in range(8)] == [1, 0.75, 0.5, 0.25, 0, 0, 0, 0]
    assert [guidance_strength(1.0, step, 4) for step in range(4)] == [1, 0.75, 0.5, 0.25]


def test_a_branch_has_the_strength_of_its_trunk(tmp_path: Path) -> None:
    recipe = Path("recipes/quickstart.yaml")
    changes = [f"branch_from={tmp_path}/checkpoints/step_4", "objective.alignment={until: 0.5, scales: [2]}"]
    with pytest.raises(UserError, match=r"branch_from does not go with objective\.alignment\.until"):
        load_config(PretrainConfig, recipe, changes)
