"""A short series says of the long one what it claims: extremes, means, noise."""

from __future__ import annotations

import numpy as np
import pytest

from mepa_ds.reports.page.series import (
    bin_edges,
    binned,
    final_value,
    middles,
    noise_of,
    rounded,
    running_mean,
    spread,
)


@pytest.mark.parametrize("count", [1, 2, 7, 479, 480, 481, 5000])
def test_bins_hold_every_extreme(count: int) -> None:
    draw = np.random.default_rng(count)
    values = draw.normal(size=count)
    values[draw.random(count) < 0.1] = np.nan
    edges = bin_edges(count, 480)
    found = binned(values, edges)
    assert (edges[0], edges[-1], len(edges) - 1) == (0, count, min(count, 480))
    assert (np.diff(edges) > 0).all()
    for low, high, start, end in zip(found.low, found.high, edges[:-1], edges[1:], strict=True):
        inside = values[start:end][np.isfinite(values[start:end])]
        expected = (inside.min(), inside.max()) if len(inside) else (np.nan, np.nan)
        np.testing.assert_array_equal((low, high), expected)


def test_a_single_spike_of_a_long_run_is_in_the_points() -> None:
    values = np.ones(100_000)
    values[54_321] = 1e6
    values[77_777] = -3.0
    found = binned(values, bin_edges(len(values), 480)).as_json()
    assert (max(found["high"]), min(found["low"]), len(found["line"])) == (1e6, -3.0, 480)


def test_running_mean_equals_a_loop() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=333)
    values[100:120] = np.nan
    expected = []
    for i in range(333):
        half = min(i, 332 - i, (333 // 50) // 2)
        window = values[i - half : i + half + 1]
        expected.append(np.nanmean(window) if np.isfinite(window).any() else np.nan)
    np.testing.assert_allclose(running_mean(values), expected, rtol=1e-12)


@pytest.mark.parametrize("trend", [0.0, 3.0])
def test_the_band_holds_95_percent_of_records(trend: float) -> None:
    """Whatever the slow trend, and although some records are spikes."""
    draw, index = np.random.default_rng(1), np.arange(4000)
    values = trend * (index + 20) ** -0.3 + draw.normal(0, 0.1, 4000)
    spikes = draw.random(4000) < 0.01
    noise = noise_of(np.where(spikes, values + 50, values))
    assert noise is not None
    assert noise.mean() == pytest.approx(0.1, rel=0.05)
    found = binned(values, bin_edges(4000, 4000))
    assert found.noise is not None
    inside = np.abs(values - found.line) < found.noise
    assert inside.mean() == pytest.approx(0.95, abs=0.02)


def test_noise_needs_records() -> None:
    assert noise_of(np.arange(12.0)) is None
    assert noise_of(np.arange(13.0)) is not None
    assert binned(np.arange(5.0), bin_edges(5, 480)).as_json() == {"line": [0, 1, 2, 3, 4], "low": [0, 1, 2, 3, 4]}


def test_the_interval_of_a_final_value_holds_it_in_95_percent_of_runs() -> None:
    draw = np.random.default_rng(2)
    found = [final_value(2 + draw.normal(0, 0.1, 1000)) for _ in range(300)]
    inside = [abs(value - 2) < (half or 0.0) for value, half in found]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.04)


def test_small_things() -> None:
    assert rounded(np.array([1.0, 2.345678, np.nan, np.inf, 1e-9, 123456.7])) == [1, 2.3457, None, None, 1e-9, 123460]
    assert [spread(range(10), most) for most in (1, 3, 20)] == [[9], [0, 4, 9], list(range(10))]
    assert middles(bin_edges(9, 3)).tolist() == [1, 4, 7]
