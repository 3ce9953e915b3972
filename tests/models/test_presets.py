"""Sizes of the named models."""

from __future__ import annotations

import pytest

from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig
from mepa_ds.models.summary import count_parameters


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        ("var-d16", 310.3, 310.3),
        ("var-d20", 600.9, 600.9),
        ("mepa-d12", 586.6, 246.6),
        ("mepa-d16", 1384.8, 579.0),
        ("mepa-d16-iso", 572.8, 308.4),
    ],
)
def test_parameter_counts(preset: str, total: float, active: float) -> None:
    counts = count_parameters(validate(ModelConfig, {"preset": preset}, "model"))
    assert round(counts.total / 1e6, 1) == total
    assert round(counts.active / 1e6, 1) == active


def test_iso_experts_cost_the_dense_ffn() -> None:
    """Top-2 + shared of hidden 4C/3, rounded to 64, against the dense 4C."""
    config = validate(ModelConfig, {"preset": "mepa-d16-iso"}, "model")
    assert 3 * config.expert_hidden / (4 * config.C) == pytest.approx(1, abs=0.02)
