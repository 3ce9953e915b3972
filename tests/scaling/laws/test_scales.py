"""One law a scale, and the law of their mean; runs held out of a fit."""

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
COUNTS = np.array([1, 4, 9])
LAWS = [s.CHINCHILLA | {"E": 2.0 + k, "A": 300.0 + 100 * k} for k in range(3)]
BY_SCALE: s.Array = np.stack([s.losses(s.chinchilla_loss, law, s.SIZES, s.TOKENS) for law in LAWS], 1)


@pytest.mark.parametrize("shared", [False, True])
def test_scales_have_their_laws_and_the_mean_is_their_sum(shared: bool) -> None:
    found = laws.fit_scales(s.SIZES, s.TOKENS, BY_SCALE, COUNTS, shared_exponents=shared, options=SOME)
    assert pytest.approx((2, 3, 4)) == found.E
    assert pytest.approx((300, 400, 500)) == found.A
    assert found.alpha == pytest.approx((0.34,) * 3)
    mean = BY_SCALE @ COUNTS / 14
    np.testing.assert_allclose(found.predict(s.SIZES, s.TOKENS), mean, rtol=1e-8)
    assert pytest.approx((2 + 4 * 3 + 9 * 4) / 14) == found.mean.E
    assert found.disagreement < 1e-8
    np.testing.assert_allclose(found.predict_scales(1e8, 1e10), [s.chinchilla_loss(p, 1e8, 1e10) for p in LAWS])
    assert laws.ScalesFit.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    rest = np.log(BY_SCALE) - np.log(found.predict_scales(s.SIZES, s.TOKENS))
    np.testing.assert_allclose(np.reshape(found.residuals, (36, 3)), rest, atol=1e-12)


def test_scales_that_do_not_add_up_are_flagged() -> None:
    """A scale with its own exponents far from the others', so that one Chinchilla law cannot be the mean."""
    losses = BY_SCALE.copy()
    losses[:, 2] = 1 + 4e6 * s.SIZES**-0.9 + 4e8 * s.TOKENS**-0.9
    losses[:, 1] = 1 + 20.0 * s.SIZES**-0.05
    found = laws.fit_scales(s.SIZES, s.TOKENS, losses, COUNTS, options=QUICK)
    assert found.disagreement > 0.005
    assert any("differ by up to" in flag for flag in found.flags)
    with pytest.raises(UserError, match=r"loss_by_scale has shape \(36, 2\)"):
        laws.fit_scales(s.SIZES, s.TOKENS, BY_SCALE[:, :2], COUNTS, options=QUICK)


def columns(loss: s.Array) -> dict[str, s.Array]:
    return {"N": s.SIZES, "D": s.TOKENS, "loss": loss}


def test_runs_held_out_are_predicted_without_them() -> None:
    loss = s.noisy(s.losses(s.chinchilla_loss, s.CHINCHILLA, s.SIZES, s.TOKENS), 1)
    held = s.SIZES > 5e8
    found = laws.hold_out("chinchilla", columns(loss), held, options=SOME)
    alone = laws.fit_chinchilla(s.SIZES[~held], s.TOKENS[~held], loss[~held], options=SOME)
    assert found.fit == alone
    assert found.rows == tuple(range(30, 36))
    np.testing.assert_allclose(found.predicted, alone.predict(s.SIZES[held], s.TOKENS[held]))
    np.testing.assert_allclose(found.error, np.log(found.measured) - np.log(found.predicted))
    assert sum(found.inside) >= 3
    assert found.noise_floor is None
    assert "no noise floor" in found.flags[0]
    json.dumps(found.to_dict())
    last = laws.rolling("chinchilla", columns(loss), options=QUICK)[-1]
    assert last.predicted == pytest.approx(found.predicted)
    changed = loss.copy()
    changed[held] *= 2
    assert laws.hold_out("chinchilla", columns(changed), held, options=SOME).predicted == found.predicted


def test_rolling_goes_on_as_long_as_the_law_can_be_fitted() -> None:
    loss = s.noisy(s.losses(s.chinchilla_loss, s.CHINCHILLA, s.SIZES, s.TOKENS), 1)
    found = laws.rolling("chinchilla", columns(loss), options=QUICK)
    assert [step.rows for step in found] == [tuple(range(i, i + 6)) for i in (18, 24, 30)]
    with pytest.raises(UserError, match="only 2 different values"):
        laws.rolling("chinchilla", {name: values[:18] for name, values in columns(loss).items()}, options=QUICK)


def test_noise_floor_is_the_spread_of_seeds() -> None:
    loss = np.exp([0.0, 0.02, 1.0, 1.01, 1.02, 3.0])
    floor, freedom = laws.noise_floor(loss, ["a", "a", "b", "b", "b", "c"])
    assert freedom == 3
    assert floor == pytest.approx(np.sqrt((2 * 0.01**2 + 2 * 0.01**2) / 3))
    assert laws.noise_floor(loss, None) == (None, 0)


def test_what_cannot_be_held_out() -> None:
    loss = s.losses(s.chinchilla_loss, s.CHINCHILLA, s.SIZES, s.TOKENS)
    for law, held, cluster, message in (
        ("nothing", s.SIZES > 0, None, "no such law to hold runs out of; choose one of power"),
        ("chinchilla", s.SIZES > 0, None, "36 of 36 runs are held out"),
        ("chinchilla", s.SIZES, None, "give one True or False a run"),
        ("chinchilla", np.arange(36) % 2 == 0, np.arange(36) // 2, "18 clusters have seeds among both"),
        ("data", s.SIZES > 5e8, None, "columns unique are missing; there are N, D, loss"),
    ):
        with pytest.raises(UserError, match=message):
            laws.hold_out(law, columns(loss), held, cluster=cluster, options=QUICK)
