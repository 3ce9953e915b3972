"""Learning-rate schedules: by hand, and wsd's promise to runs of one family of lengths."""

from __future__ import annotations

import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mepa_ds.config.base import validate
from mepa_ds.config.optim import OptimConfig
from mepa_ds.errors import UserError
from mepa_ds.runtime.schedule import check_phases, learning_rate, phase_steps

Schedule = Literal["lin0", "cosine", "constant"]


def test_lin0_is_vars_schedule() -> None:
    """`lr_wd_annealing('lin0', ...)` of VAR, written out."""
    config, steps, batch = OptimConfig(), 1000, 768
    warmup, peak = 20, 1e-4 * 768 / 256
    for step in range(steps):
        if step < warmup:
            expected = 0.005 + 0.995 * step / warmup
        else:
            passed = (step - warmup) / (steps - 1 - warmup)
            expected = 1.0 if passed < 0.05 else 0.1 + 0.9 * (1 - passed) / 0.95
        assert learning_rate(config, batch, step, steps) == pytest.approx(peak * expected)


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("constant", [1, 1, 1, 1]),
        ("cosine", [1, 0.2 + 0.8 * 0.75, 0.2 + 0.8 * 0.25, 0.2]),
        ("lin0", [1, 0.2 + 0.8 * (2 / 3) / 0.95, 0.2 + 0.8 * (1 / 3) / 0.95, 0.2]),
    ],
)
def test_rates_by_hand(schedule: Schedule, after: list[float]) -> None:
    """13 steps, 3 of them warm-up from a tenth; then at 0, 1/3, 2/3 and 1 of the rest, down to a fifth of the peak."""
    config = OptimConfig(base_lr=0.5, schedule=schedule, warmup=0.25, warmup_start=0.1, final_lr=0.2)
    found = [learning_rate(config, 512, step, 13) for step in (0, 1, 2, 3, 6, 9, 12)]
    assert found == pytest.approx([0.1, 0.4, 0.7, *after])  # the peak is 0.5 x 512 / 256
    assert learning_rate(config, 512, 1, 2) == pytest.approx(after[-1])


@pytest.mark.parametrize("schedule", ["lin0", "cosine"])
def test_schedules_end_at_their_final_rate(schedule: Schedule) -> None:
    config = OptimConfig(schedule=schedule, final_lr=0.1)
    assert learning_rate(config, 256, 99, 100) == pytest.approx(1e-5)
    assert learning_rate(config, 256, 0, 1) > 0


def test_wsd_by_hand() -> None:
    """20 steps: 2 of warm-up from a tenth, the peak, and a cooldown of 4 steps (16 to 19) that ends at a fifth."""
    config = OptimConfig(base_lr=0.5, schedule="wsd", warmup_steps=2, warmup_start=0.1, final_lr=0.2)
    found = [learning_rate(config, 512, step, 20) for step in range(20)]
    down = [0.2 + 0.8 * (1 - math.sqrt(share)) for share in (0.25, 0.5, 0.75)]
    assert found == pytest.approx([0.1, 0.55, *[1.0] * 14, *down, 0.2])  # the peak is 0.5 x 512 / 256
    assert found[15] == found[2] == 1.0
    assert found[16] == pytest.approx(0.6)


def test_wsd_without_cooldown_is_constant() -> None:
    wsd, constant = (OptimConfig(schedule=name, cooldown=0, warmup=0.1) for name in ("wsd", "constant"))
    for step in range(50):
        assert learning_rate(wsd, 256, step, 50) == learning_rate(constant, 256, step, 50)


lengths = st.integers(1, 5000)


@given(
    warmup_steps=st.integers(0, 50),
    first=lengths,
    second=lengths,
    cooldowns=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    final=st.floats(0, 1),
    batch=st.integers(1, 4096),
)
def test_runs_of_one_warmup_have_the_same_rates_up_to_the_cooldown(
    warmup_steps: int, first: int, second: int, cooldowns: tuple[float, float], final: float, batch: int
) -> None:
    """Bit by bit: a branch would otherwise not equal the run that it stands for."""
    configs = [
        OptimConfig(schedule="wsd", warmup_steps=warmup_steps, cooldown=cooldown, final_lr=final)
        for cooldown in cooldowns
    ]
    ends = [steps - phase_steps(config, steps)[1] for config, steps in zip(configs, (first, second), strict=True)]
    rates = [
        [learning_rate(config, batch, step, steps) for step in range(min(ends))]
        for config, steps in zip(configs, (first, second), strict=True)
    ]
    assert rates[0] == rates[1]


@given(steps=lengths, cooldown=st.floats(0.01, 0.9), final=st.floats(0, 1))
def test_the_cooldown_falls_to_the_final_rate_in_the_last_step(steps: int, cooldown: float, final: float) -> None:
    config = OptimConfig(schedule="wsd", warmup_steps=0, cooldown=cooldown, final_lr=final)
    rates = [learning_rate(config, 256, step, steps) for step in range(steps)]
    length = phase_steps(config, steps)[1]
    assert rates[: steps - length] == [config.base_lr] * (steps - length)
    assert rates == sorted(rates, reverse=True)
    if length:
        assert rates[-1] == pytest.approx(config.base_lr * final)


def test_phases_that_do_not_fit_are_refused() -> None:
    config = OptimConfig(schedule="wsd", warmup_steps=10, cooldown=0.5)
    check_phases(config, 20)
    with pytest.raises(UserError, match=r"wsd: 10 steps of warm-up and 9 of cooldown do not fit into the 18 steps"):
        check_phases(config, 18)
    check_phases(config.model_copy(update={"schedule": "constant"}), 5)
    with pytest.raises(UserError, match=r"warmup \(0.6\) and cooldown \(0.5\) are shares of the same steps"):
        validate(OptimConfig, {"schedule": "wsd", "warmup": 0.6, "cooldown": 0.5}, "x")
