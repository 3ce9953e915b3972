"""IsoFLOP profiles, learning-rate sweeps and scores, against closed forms."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mepa_ds.errors import UserError
from mepa_ds.scaling import laws
from mepa_ds.scaling.laws import FitOptions
from tests.scaling.laws import synthetic as s
from tests.scaling.laws.synthetic import QUICK

SOME = FitOptions(draws=100)
BUDGETS = np.repeat(np.geomspace(1e18, 1e20, 4), 7)
RATIO = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
BEST = RATIO * (BUDGETS / 6) ** (0.28 / 0.62)
AROUND: s.Array = np.tile(np.geomspace(0.2, 5, 7), 4)


def profile(N: s.Array) -> s.Array:
    return s.losses(s.chinchilla_loss, s.CHINCHILLA, N, BUDGETS / 6 / N)


def test_isoflop_minima_beside_the_surface() -> None:
    """Centred profiles give the exponent; the surface gives it wherever they lie."""
    found = laws.fit_isoflop(BUDGETS, BEST * AROUND, profile(BEST * AROUND), options=SOME)
    assert found.a == pytest.approx(0.28 / 0.62, rel=1e-6)
    assert found.akima is not None
    assert found.akima.a == pytest.approx(0.28 / 0.62, rel=1e-3)
    assert found.surface_a == pytest.approx(0.28 / 0.62, rel=1e-6)
    assert found.surface_k == pytest.approx(RATIO / 6 ** (0.28 / 0.62), rel=1e-4)
    assert found.predict(1e19) == pytest.approx(RATIO * (1e19 / 6) ** (0.28 / 0.62), rel=0.05)
    assert found.intervals["a"][0] < found.a < found.intervals["a"][1]
    again = laws.IsoflopFit.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found


def test_parabolas_are_biased_and_the_surface_is_not() -> None:
    """Sizes that drift from too small to too large, without noise."""
    N = BEST * AROUND * np.repeat(np.geomspace(0.4, 2.5, 4), 7)
    found = laws.fit_isoflop(BUDGETS, N, profile(N), options=QUICK)
    assert abs(found.a - 0.28 / 0.62) > 0.005
    assert found.surface_a == pytest.approx(0.28 / 0.62, rel=1e-6)


def test_minima_at_the_edge_are_left_out_and_named() -> None:
    N = BEST * AROUND
    N[:7] *= 8
    found = laws.fit_isoflop(BUDGETS, N, profile(N), options=QUICK)
    assert [bool(minimum.why) for minimum in found.minima] == [True, False, False, False]
    assert "The budget 1e+18 is left out: the minimum is at the edge of what was sampled." in found.flags
    assert found.a == pytest.approx(0.28 / 0.62, rel=1e-6)
    N = BEST * AROUND * 8
    with pytest.raises(UserError, match=r"isoflop: 0 budgets have a minimum .* at least 2 are needed"):
        laws.fit_isoflop(BUDGETS, N, profile(N), options=QUICK)


def sweep(sizes: list[float], lengths: list[float], shift: float = 1.0) -> tuple[s.Array, s.Array, s.Array, s.Array]:
    """N, D, lr and loss of parabolas whose minimum is at 0.3 N^-0.33 D^0.1."""
    rates = np.geomspace(1e-4, 3e-2, 7)
    N, D = np.repeat(sizes, 7), np.repeat(lengths, 7)
    lr = np.tile(rates, len(sizes)) * shift
    return N, D, lr, 3 + 0.05 * np.log(lr / (0.3 * N**-0.33 * D**0.1)) ** 2


def test_learning_rates_follow_their_law() -> None:
    N, D, lr, loss = sweep([1e7, 5e7, 2e8], [1e8] * 3)
    found = laws.fit_lr(N, lr, loss, options=SOME)
    assert found.a == pytest.approx(-0.33)
    assert found.predict(1e9) == pytest.approx(0.3 * 1e9**-0.33 * 1e8**0.1)
    N, D, lr, loss = sweep([1e7, 1e7, 2e8, 2e8], [1e8, 1e9, 1e8, 1e9])
    both = laws.fit_lr(N, lr, loss, D=D, options=SOME)
    assert isinstance(both, laws.LrDataFit)
    assert (both.k, both.a, both.b) == pytest.approx((0.3, -0.33, 0.1))
    order = np.random.default_rng(0).permutation(len(N))
    assert laws.fit_lr(N[order], lr[order], loss[order], D=D[order], options=SOME) == both
    assert laws.LrDataFit.from_dict(json.loads(json.dumps(both.to_dict()))) == both


def test_sweeps_with_their_minimum_at_the_edge_are_refused() -> None:
    N, D, lr, loss = sweep([1e7, 5e7, 2e8], [1e8] * 3)
    far = sweep([1e9], [1e8], shift=30)
    N, lr, loss = (np.concatenate([one, other]) for one, other in ((N, far[0]), (lr, far[2]), (loss, far[3])))
    found = laws.fit_lr(N, lr, loss, options=QUICK)
    assert found.a == pytest.approx(-0.33)
    assert "The sweep at N = 1e+09" in found.flags[0]
    assert "at the edge" in found.flags[0]
    N, D, lr, loss = sweep([1e7, 5e7], [1e8] * 2, shift=100)
    with pytest.raises(UserError, match=r"0 sweeps at 0 sizes .* Sweep further to both sides"):
        laws.fit_lr(N, lr, loss, options=QUICK)
    N, D, lr, loss = sweep([1e7, 5e7, 2e8], [1e8, 5e8, 2e9])
    with pytest.raises(UserError, match="collinear"):
        laws.fit_lr(N, lr, loss, D=D, options=QUICK)


def test_scores_follow_the_reducible_loss() -> None:
    loss = np.linspace(2.5, 4, 8)
    found = laws.fit_link(loss, 2.0, 30 * (loss - 2) ** 1.5, options=SOME)
    assert (found.k, found.m, found.E) == pytest.approx((30, 1.5, 2))
    assert "E" not in found.intervals
    assert found.predict(3.0) == pytest.approx(30)
    with pytest.raises(UserError, match=r"1\.9 is not above E = 2: no score belongs to it"):
        found.predict(1.9)
    with pytest.raises(UserError, match=r"E: 2\.6 is not allowed"):
        laws.fit_link(loss, 2.6, loss, options=QUICK)
    with pytest.raises(UserError, match="2 runs, but the law needs at least 3"):
        laws.fit_link(loss[:2], 2.0, loss[:2], options=QUICK)
