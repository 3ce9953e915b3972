"""Initial weights have VAR's scales, experts' too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig
from mepa_ds.models.transformer import NextScaleTransformer

DEPTH, C = 4, 128
STD = math.sqrt(1 / (3 * C))
RESIDUAL = STD / math.sqrt(2 * DEPTH)
GAMMA = 1e-3


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("var-d16", 1e-3), ("mepa-d20", 1e-3), ("var-d24", 1e-4), ("mepa-d30-iso", 1e-5), ("var-d36-512", 5e-6)],
)
def test_gates_of_deeper_models_start_smaller(preset: str, expected: float) -> None:
    assert validate(ModelConfig, {"preset": preset}, "model").adaln_gamma_init == expected
    assert validate(ModelConfig, {"preset": preset, "adaln_gamma_init": 0.5}, "model").adaln_gamma_init == 0.5


def assert_std(values: Tensor, expected: float) -> None:
    """Within five standard errors of the standard deviation, around zero."""
    error = 5 * expected / math.sqrt(2 * values.numel())
    assert abs(float(values.std()) - expected) < error, (float(values.std()), expected)
    assert abs(float(values.mean())) < 5 * expected / math.sqrt(values.numel())


def make(preset: str, **changes: object) -> dict[str, Tensor]:
    sizes = {"width": C, "num_heads": 2, "scales": (1, 2, 3), "codebook_size": 512, **changes}
    model = NextScaleTransformer.from_preset(preset, num_classes=20, **sizes)  # type: ignore[arg-type]
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("preset", "experts"), [("var-d4", False), ("mepa-d4", True)])
def test_every_parameter_has_vars_scale(preset: str, experts: bool) -> None:
    weights = make(preset)
    for name in ("word_embed.weight", "class_embed.weight", "position_embed", "scale_embed.weight"):
        assert_std(weights[name], STD)
    assert_std(weights["head.weight"], 0.02 * STD)
    assert_std(weights["head_adaln.weight"], 0.5 * STD)
    for block in range(DEPTH):
        own = {name.removeprefix(f"blocks.{block}."): value for name, value in weights.items() if f"s.{block}." in name}
        assert_std(own["attention.qkv.weight"], STD)
        assert_std(own["attention.proj.weight"], RESIDUAL)
        assert torch.all(own["attention.log_temperature"] == math.log(4))
        assert_std(own["adaln.weight"][: 2 * C], GAMMA * STD)
        assert_std(own["adaln.weight"][2 * C :], 0.5 * STD)
        for layer, expected in (("fc1", STD), ("fc2", RESIDUAL)):
            matrices = [value for name, value in own.items() if layer in name and name.endswith("weight")]
            assert len(matrices) == (2 if experts else 1)  # routed and shared
            for value in matrices:
                assert_std(value, expected)
    assert all(torch.all(value == 0) for name, value in weights.items() if name.endswith("bias"))


def test_offsets_of_shared_adaln() -> None:
    """VAR draws `ada_gss` with std 1 / sqrt(C), then scales gates and the rest; the projection stays as drawn."""
    weights = make("var-d4", shared_adaln=True)
    assert_std(weights["shared_adaln.weight"], STD)
    for block in range(DEPTH):
        offset = weights[f"blocks.{block}.adaln_offset"]
        assert offset.shape == (1, 1, 6, C)
        assert_std(offset[:, :, :2], GAMMA / math.sqrt(C))
        assert_std(offset[:, :, 2:], 0.5 / math.sqrt(C))
