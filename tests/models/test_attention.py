"""Attention against a plain one with a mask (tests/reference.py)."""

from __future__ import annotations

import math

import pytest
import torch

from mepa_ds.models.attention import SelfAttention
from mepa_ds.scales import ScaleSchedule
from tests.reference import attention

SCHEDULE = ScaleSchedule.of((1, 2, 3))


@pytest.mark.parametrize("temperatures", [(4.0, 0.5), (99.0, 100.0), (101.0, 4000.0)])
def test_the_temperature_is_learned_up_to_100(temperatures: tuple[float, float]) -> None:
    torch.manual_seed(0)
    layer = SelfAttention(8, 2, qk_norm=True).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        assert layer.log_temperature is not None
        layer.log_temperature.copy_(torch.tensor(temperatures).log().view(1, 2, 1, 1))
    x_BLC = torch.randn(2, SCHEDULE.num_tokens, 8, dtype=torch.float64)
    weights = {f"x.{name}": value.detach() for name, value in layer.named_parameters()}
    expected = attention(weights, x_BLC, "x", 2, SCHEDULE.scale_index_L())
    torch.testing.assert_close(layer(x_BLC, SCHEDULE.bounds), expected, rtol=1e-9, atol=1e-9)
    assert pytest.approx(math.log(100)) == layer.MAX_LOG_TEMPERATURE
