"""How much scales count in the loss, against their formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mepa_ds.config.model import SCALES_256, ModelConfig
from mepa_ds.config.objective import ObjectiveConfig
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.objective import ModelInputs, PretrainingObjective
from mepa_ds.objective.scale_weights import Over, token_weights
from mepa_ds.scales import ScaleSchedule

CPU = torch.device("cpu")
SCHEDULE = ScaleSchedule.of(SCALES_256)


def shares(over: Over, schedule: ScaleSchedule = SCHEDULE) -> list[float]:
    weights_L = token_weights(over, schedule, CPU)
    assert weights_L.mean().item() == pytest.approx(1, abs=1e-6)
    return [(weights_L[start:end].sum() / weights_L.sum()).item() for start, end in schedule.bounds]


def test_shares_of_the_scales() -> None:
    assert shares("tokens") == pytest.approx([length / 680 for length in SCHEDULE.lengths], abs=1e-6)
    assert shares("scales") == pytest.approx([0.1] * 10, abs=1e-6)
    sides = np.array(SCALES_256) / 16
    bell = np.exp(-(((sides[::-1] - sides.mean()) / sides.std(ddof=1)) ** 2) / 2)
    assert shares("log_normal") == pytest.approx((bell / bell.sum()).tolist(), abs=1e-6)
    assert shares("log_normal", ScaleSchedule.of((4,))) == [1.0]


@pytest.mark.parametrize("over", ["tokens", "scales", "log_normal"])
@pytest.mark.parametrize("num_scales", [3, 2])
def test_the_loss_is_the_weighted_mean(over: Over, num_scales: int) -> None:
    """Of the scales that are there: a progressive run begins with the coarse ones."""
    config = ModelConfig(depth=1, width=64, num_heads=1, num_classes=3, scales=(1, 2, 4), codebook_size=8, code_width=4)
    objective = PretrainingObjective(
        NextScaleTransformer(config), ObjectiveConfig(alignment=None, ce_over=over, label_smoothing=0.1), None
    )
    objective.init_weights(0)
    torch.manual_seed(0)
    schedule = ScaleSchedule.of(config.scales)
    end = schedule.bounds[num_scales - 1][1]
    inputs = ModelInputs(torch.tensor([0, 2]), torch.randn(2, end - 1, 4), torch.randint(8, (2, end)))
    losses = objective(inputs)
    logits_BLV = objective.transformer(inputs.labels_B, inputs.inputs_BLZ).logits_BLV
    sums = {}
    for smoothing in (0.0, 0.1):
        ce_BL = F.cross_entropy(
            logits_BLV.transpose(1, 2), inputs.tokens_BL, reduction="none", label_smoothing=smoothing
        )
        each = [ce_BL[:, start:stop].mean() for start, stop in schedule.bounds[:num_scales]]
        shares_of_all = shares(over, schedule)[:num_scales]
        sums[smoothing] = sum(s * ce for s, ce in zip(shares_of_all, each, strict=True)) / sum(shares_of_all)
        if not smoothing:
            torch.testing.assert_close(losses.terms["ce"], ce_BL.mean())
    torch.testing.assert_close(losses.total, sums[0.1])
