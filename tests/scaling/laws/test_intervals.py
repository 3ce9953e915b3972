"""Intervals hold the truth as often as they say, and the bootstrap draws what it says."""

from __future__ import annotations

import numpy as np
import pytest

from mepa_ds.scaling import laws
from mepa_ds.scaling.laws import FitOptions
from mepa_ds.scaling.laws.fitting.result import tail_share
from mepa_ds.scaling.laws.fitting.rows import Rows
from tests.scaling.laws import synthetic as s
from tests.scaling.laws.test_optimum import CASES

# Points within the runs' range and beyond it, up to twice the largest size and length, and twice the experts.
JOINT_PLACES = np.array(
    [(3e7, 3, 5e9), (1e8, 8, 2e10), (5e8, 32, 8e10), (2e9, 32, 2e11), (2e9, 8, 2e11), (1e9, 64, 1e11)]
).T


def hits(name: str, seeds: range, options: FitOptions) -> dict[str, int]:
    """How often each parameter's interval holds the truth, over draws of 1 % noise."""
    _, fit, truth, law, inputs = CASES[name]
    clean = s.losses(law, truth, *inputs)
    found = dict.fromkeys(truth, 0)
    for seed in seeds:
        intervals = fit(*inputs, s.noisy(clean, seed), options=options).intervals
        for parameter, value in truth.items():
            low, high = intervals[parameter]
            found[parameter] += low <= value <= high
    return found


@pytest.mark.parametrize("name", ["power", "chinchilla"])
def test_intervals_hold_the_truth(name: str) -> None:
    """12 of the 100 draws of the test below."""
    found = hits(name, range(12), FitOptions(draws=100))
    assert min(found.values()) >= 10, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["power", "chinchilla", "data"])
def test_each_parameter_is_inside_its_interval_in_90_of_100_draws(name: str) -> None:
    found = hits(name, range(100), FitOptions())
    print(name, found)
    assert min(found.values()) >= 90, found


def joint_hits(seeds: range, options: FitOptions) -> tuple[s.Array, s.Array]:
    """How often the intervals of the law, and of one more run, hold those at `JOINT_PLACES`."""
    _, fit, truth, law, inputs = CASES["joint-moe"]
    clean, there = s.losses(law, truth, *inputs), s.losses(law, truth, *JOINT_PLACES)
    of_law, of_run = np.zeros(len(there)), np.zeros(len(there))
    for seed in seeds:
        found = fit(*inputs, s.noisy(clean, seed), options=options)
        low, high = found.predict_interval(*JOINT_PLACES, noise=False)
        of_law += (low <= there) & (there <= high)
        low, high = found.predict_interval(*JOINT_PLACES)
        run = s.noisy(there, 10_000 + seed)
        of_run += (low <= run) & (run <= high)
    return of_law, of_run


def test_joint_law_predicts_within_its_intervals() -> None:
    of_law, of_run = joint_hits(range(2), FitOptions(draws=100))
    assert min(*of_law, *of_run) >= 1, (of_law, of_run)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_joint_law_predicts_within_its_intervals_in_90_of_100_draws() -> None:
    of_law, of_run = joint_hits(range(100), FitOptions())
    print("joint-moe", of_law, of_run)
    assert min(*of_law, *of_run) >= 90, (of_law, of_run)


def test_seeds_are_drawn_together_and_sizes_keep_their_share() -> None:
    cluster = np.repeat(np.arange(18), 2)
    loss = s.losses(s.chinchilla_loss, s.CHINCHILLA, s.SIZES, s.TOKENS)
    rows = Rows.of({"N": np.repeat(s.SIZES[::6], 6), "D": s.TOKENS}, loss, cluster)
    weights = rows.draw_weights(50, 0)
    for label in range(18):
        members = weights[:, rows.cluster_N == label]
        assert (members == members[:, :1]).all(), "seeds of a run come and go together"
    for stratum in np.unique(rows.stratum_N):
        assert (weights[:, rows.stratum_N == stratum].sum(1) == (rows.stratum_N == stratum).sum()).all()
        assert len(np.unique(rows.cluster_N[rows.stratum_N == stratum])) >= 4, "three have too little to draw"
    assert len(np.unique(rows.stratum_N)) == 3, "neighbouring sizes of three runs are joined"
    assert rows.inflation() == pytest.approx(np.sqrt(18 / 15))
    assert len(np.unique(Rows.of({"x": s.SIZES}, loss, np.arange(36)).stratum_N)) == 6


def test_seeds_drawn_together_widen_intervals() -> None:
    """Six runs a size that are two with three seeds each, which share most of their noise."""
    cluster = np.repeat(np.arange(12), 3)
    rng = np.random.default_rng(0)
    loss = s.losses(s.power_loss, s.POWER, s.LADDER) * np.exp(
        0.01 * np.repeat(rng.normal(size=12), 3) + 0.001 * rng.normal(size=36)
    )
    options = FitOptions(draws=100)
    apart = laws.fit_power(s.LADDER, loss, options=options).intervals["alpha"]
    together = laws.fit_power(s.LADDER, loss, cluster=cluster, options=options).intervals["alpha"]
    assert together[1] - together[0] > 1.2 * (apart[1] - apart[0])


def test_tail_of_expanded_percentiles() -> None:
    assert tail_share(0.95, 10**9, 1.0) == pytest.approx(0.025, abs=1e-6)
    assert tail_share(0.95, 31, 1.0) == pytest.approx(0.0207, abs=2e-4)
    assert tail_share(0.95, 31, 1.2) < tail_share(0.95, 31, 1.0)


def test_a_prediction_of_a_run_is_less_sure_than_the_law() -> None:
    loss = s.noisy(s.losses(s.chinchilla_loss, s.CHINCHILLA, s.SIZES, s.TOKENS), 1)
    found = laws.fit_chinchilla(s.SIZES, s.TOKENS, loss, options=FitOptions(draws=100))
    low, high = found.predict_interval(1e8, 1e10)
    low_law, high_law = found.predict_interval(1e8, 1e10, noise=False)
    assert low < low_law < found.predict(1e8, 1e10) < high_law < high
    narrow = found.predict_interval(1e8, 1e10, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    lows, _ = found.predict_interval([1e8, 1e12], [1e10, 1e14])
    assert lows.shape == (2,)
    assert lows[0] == pytest.approx(low)
