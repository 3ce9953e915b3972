"""Paired differences against SciPy's paired t-test and the textbook's two-way analysis of variance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mepa_ds.ablation.statistics import Scores, differences, noise_of


def made(arms: int, seeds: int, noise: float = 0.1) -> tuple[Scores, np.ndarray]:
    rng = np.random.default_rng(0)
    values_AS = rng.normal(size=(arms, 1)) + 5 * rng.normal(size=(1, seeds)) + noise * rng.normal(size=(arms, seeds))
    return {f"a{arm}": {seed: float(values_AS[arm, seed]) for seed in range(seeds)} for arm in range(arms)}, values_AS


def test_two_arms_are_a_paired_t_test() -> None:
    scores, values_AS = made(2, 5)
    found = differences(scores, [("a1", "a0")])[0]
    expected = stats.ttest_rel(values_AS[1], values_AS[0])
    interval = expected.confidence_interval(0.95)
    assert (found.mean, found.p_value) == pytest.approx(((values_AS[1] - values_AS[0]).mean(), expected.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.by_seed == pytest.approx(tuple(values_AS[1] - values_AS[0]))


def test_noise_is_that_of_a_two_way_layout() -> None:
    scores, values_AS = made(6, 3)
    left = values_AS - values_AS.mean(0) - values_AS.mean(1, keepdims=True) + values_AS.mean()
    noise = noise_of(scores)
    assert noise.degrees == 5 * 2
    assert noise.deviation == pytest.approx(np.sqrt(np.square(left).sum() / 10))


def test_runs_may_be_missing() -> None:
    scores, values_AS = made(4, 3)
    del scores["a1"][2]  # type: ignore[attr-defined]
    noise = noise_of(scores)
    assert noise.degrees == 3 * 2 - 1
    found = differences(scores, [("a1", "a0"), ("a2", "a0"), ("gone", "a0")])
    assert [d.arm for d in found] == ["a1", "a2"]
    assert found[0].by_seed == pytest.approx(tuple((values_AS[1] - values_AS[0])[:2]))
    widths = [d.high - d.low for d in found]
    assert widths[0] / widths[1] == pytest.approx(np.sqrt(3 / 2))


def test_without_a_degree_of_freedom_there_is_no_interval() -> None:
    found = differences({"a": {0: 1.0}, "b": {0: 3.0}}, [("b", "a")])[0]
    assert found.mean == 2
    assert np.isnan([found.low, found.high, found.p_value]).all()
    assert not found.is_clear


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng, truth, held, clear = np.random.default_rng(1), np.array([0.0, 0.5, 0.0, 0.0]), 0, 0
    for _ in range(300):
        values_AS = truth[:, None] + rng.normal(size=(1, 3)) + 0.3 * rng.normal(size=(4, 3))
        scores = {str(arm): dict(enumerate(values_AS[arm].tolist())) for arm in range(4)}
        found = differences(scores, [(str(arm), "0") for arm in (1, 2, 3)])
        held += sum(d.low <= truth[int(d.arm)] <= d.high for d in found)
        clear += any(d.is_clear for d in found if d.arm != "1")
    assert 0.93 < held / 900 < 0.97
    assert clear / 300 < 0.06  # 5 % over all comparisons, and two of three are counted here
