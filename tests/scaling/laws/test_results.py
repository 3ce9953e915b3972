"""What a fit returns: exact JSON, optimum, flags; and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mepa_ds.errors import UserError
from mepa_ds.scaling import laws
from mepa_ds.scaling.laws import FitOptions
from tests.scaling.laws import synthetic as s
from tests.scaling.laws.synthetic import QUICK
from tests.scaling.laws.test_optimum import CASES

CLEAN = s.losses(s.chinchilla_loss, s.CHINCHILLA, s.SIZES, s.TOKENS)
LOSS = s.noisy(CLEAN, 2)
SOME = FitOptions(draws=100)


@pytest.mark.parametrize("name", CASES)
def test_json_has_every_digit(name: str) -> None:
    """Rounded coefficients would change predictions and the objective."""
    _, fit, truth, law, inputs = CASES[name]
    fixed = {"Es": 1.847, "Em": 314.478} if name == "routed" else {}
    found = fit(*inputs, s.noisy(s.losses(law, truth, *inputs), 4, 0.001), options=SOME, **fixed)
    again = laws.FITS[name].from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    np.testing.assert_array_equal(again.predict(*inputs), found.predict(*inputs))
    assert again.predict_interval(*(values[0] for values in inputs)) == found.predict_interval(
        *(values[0] for values in inputs)
    )


def test_infinite_ends_survive_json() -> None:
    found = laws.fit_chinchilla(s.SIZES, s.TOKENS, LOSS, options=SOME)
    data = found.to_dict() | {"intervals": {"E": ["-inf", "inf"]}}
    assert laws.ChinchillaFit.from_dict(json.loads(json.dumps(data))).intervals["E"] == (-np.inf, np.inf)
    for wrong in ({**data, "law": "power"}, {key: value for key, value in data.items() if key != "E"}):
        with pytest.raises(UserError, match="this is no fit of that law"):
            laws.ChinchillaFit.from_dict(wrong)


def test_optimum_is_the_least_loss_of_the_budget() -> None:
    found = laws.fit_chinchilla(s.SIZES, s.TOKENS, CLEAN, options=SOME)
    for flops_per in (6.0, 7.3):
        N, D, loss = best = found.optimum(1e20, flops_per)
        assert flops_per * N * D == pytest.approx(1e20)
        sizes = N * np.geomspace(0.5, 2, 2001)
        losses = found.predict(sizes, 1e20 / flops_per / sizes)
        assert loss == pytest.approx(losses.min(), rel=1e-9)
        assert sizes[losses.argmin()] == pytest.approx(N, rel=1e-3)
        assert best.intervals["N"][0] <= N * 1.001
        assert best.flags == ()
    assert found.a == pytest.approx(0.28 / 0.62)
    assert "outside the sampled range, 1e+07 to 1e+09" in found.optimum(1e24).flags[0]
    with pytest.raises(UserError, match="C: 0 is not allowed; give a number above 0"):
        found.optimum(0)


def test_flag_of_e_at_zero() -> None:
    loss = s.noisy(406.4 * s.LADDER**-0.3 - 0.1, 3)
    found = laws.fit_power(s.LADDER, loss, options=SOME)
    assert found.E == 0
    assert found.flags[0] == "E is at 0: the runs show no sign of this term."
    assert "The interval of E reaches 0." in found.flags
    assert found.intervals["E"][0] == 0
    pinned = laws.fit_power(s.LADDER, loss, E=0, options=QUICK)
    assert pinned.objective == pytest.approx(found.objective, rel=1e-12)


def test_flag_of_parameters_that_runs_do_not_determine() -> None:
    """No size lies beyond the best one for its data, so nothing tells R*_N."""
    N, D = s.SIZES, s.REPEATED * 1000
    unique = np.where(np.arange(36) % 2 == 0, D, D / 4)
    loss = s.noisy(s.losses(s.data_loss, s.DATA, N, D, unique), 0)
    base = {name: s.DATA[name] for name in ("E", "A", "B", "alpha", "beta")}
    found = laws.fit_data_constrained(N, D, unique, loss, base=base, options=SOME)
    assert "RN_star is not determined: no run's loss depends on it." in found.flags
    assert found.intervals["RN_star"] == (0.0, np.inf)
    assert any("interval of RN_star is unbounded" in flag for flag in found.flags)


def test_flag_of_outliers_names_rows() -> None:
    loss = LOSS.copy()
    loss[17] *= 1.3
    flags = laws.fit_chinchilla(s.SIZES, s.TOKENS, loss, options=QUICK).flags
    assert any("Runs further than 5 deviations from the law, by row: 17 (+2" in flag for flag in flags)
    order = np.roll(np.arange(36), 5)
    flags = laws.fit_chinchilla(s.SIZES[order], s.TOKENS[order], loss[order], options=QUICK).flags
    assert any("by row: 22 (+2" in flag for flag in flags)


def test_flag_of_experts_that_are_not_identified() -> None:
    _, fit, truth, law, inputs = CASES["joint-moe"]
    found = fit(*inputs, s.losses(law, truth, *inputs), Es=None, Em=None, options=QUICK)
    assert "one table of losses does not identify them" in found.flags[0]
    assert fit(*inputs, s.losses(law, truth, *inputs), options=QUICK).flags == ()
    dense = found.at_experts(1)
    assert dense["m"] == pytest.approx(30.364, rel=2e-3)
    assert dense["mu"] == pytest.approx(-0.1817, rel=1e-3)


def arrays(**changes: Any) -> tuple[Any, Any, Any]:
    return tuple(changes.get(name, value) for name, value in (("N", s.SIZES), ("D", s.TOKENS), ("loss", LOSS)))  # type: ignore[return-value]


def changed(values: s.Array, place: int, value: float) -> s.Array:
    result = values.copy()
    result[place] = value
    return result


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "few": (lambda: laws.fit_chinchilla(*(v[:5] for v in arrays())), r"5 runs, but the law needs at least 6"),
    "none": (lambda: laws.fit_power([], []), r"power: 0 runs, but the law needs at least 4"),
    "none at all": (lambda: laws.fit_chinchilla([], [], []), r"chinchilla: 0 runs, but the law needs at least 6"),
    "few for moe": (
        lambda: laws.fit_joint_moe(s.SIZES[:9], s.EXPERTS[:9], s.TOKENS[:9], LOSS[:9]),
        "joint-moe: 9 runs, but the law needs at least 10",
    ),
    "collinear": (
        lambda: laws.fit_chinchilla(*arrays(D=20 * s.SIZES)),
        r"collinear \(correlation 1\.0000, allowed up to 0\.995\).*several lengths",
    ),
    "one budget": (lambda: laws.fit_chinchilla(*arrays(D=1e18 / s.SIZES)), "collinear"),
    "NaN": (lambda: laws.fit_chinchilla(*arrays(loss=changed(LOSS, 3, np.nan))), "loss: row 3 is NaN or infinite"),
    "infinite": (lambda: laws.fit_chinchilla(*arrays(N=changed(s.SIZES, 0, np.inf))), "N: row 0 is NaN or infinite"),
    "negative": (
        lambda: laws.fit_chinchilla(*arrays(loss=changed(LOSS, 35, -1))), r"row 35 is not above 0 \(the first is -1\)",
    ),
    "lengths": (lambda: laws.fit_chinchilla(s.SIZES, s.TOKENS, LOSS[1:]), "different lengths .N 36, D 36, loss 35"),
    "units": (
        lambda: laws.fit_chinchilla(*arrays(N=s.SIZES / 1e7, D=s.TOKENS * 1e3)), "N is at most 100 .* cannot be",
    ),
    "one size": (lambda: laws.fit_chinchilla(*arrays(N=np.full(36, 1e7))), "N: one size only"),
    "two sizes": (lambda: laws.fit_power(np.repeat([1.0, 2.0], 18), LOSS), "only 2 different values"),
    "words": (lambda: laws.fit_chinchilla(*arrays(N=["d16"] * 36)), "N: not numbers"),
    "truth values": (lambda: laws.fit_power(s.SIZES > 1e8, LOSS), "x: not numbers"),
    "shape": (lambda: laws.fit_power(s.SIZES.reshape(6, 6), LOSS), r"array of shape \(6, 6\)"),
    "E": (lambda: laws.fit_chinchilla(*arrays(), E=9.0), "E: 9.0 is not allowed; it must be at least 0 and below"),
    "cluster": (lambda: laws.fit_chinchilla(*arrays(), cluster=[1, 2]), "cluster: 2 labels for 36 runs"),
    "never repeated": (
        lambda: laws.fit_data_constrained(s.SIZES, s.TOKENS, s.TOKENS, LOSS), "no run has seen its data twice",
    ),
    "base": (
        lambda: laws.fit_data_constrained(s.SIZES, s.REPEATED, s.UNIQUE, LOSS, base={"A": 1.0}), "base: give a fit",
    ),
    "single epochs": (
        lambda: laws.fit_data_constrained(s.SIZES, s.REPEATED, s.REPEATED / 2, LOSS, base="single_epoch"),
        "of the runs that see their data once, chinchilla: 0 runs",
    ),
    "unknown argument": (
        lambda: laws.fit_joint_moe(s.SIZES, s.EXPERTS, s.TOKENS, LOSS, tied=True), "unknown arguments tied",
    ),
    "Es alone": (lambda: laws.fit_routed(s.SIZES, s.EXPERTS, LOSS, Es=2.0), "give both, or None for both"),
    "no experts": (lambda: laws.fit_routed(s.SIZES, s.EXPERTS / 2, LOSS), "E: below 1"),
    "few starts": (lambda: FitOptions(num_starts=10), "num_starts: 10 is not allowed; give at least 48"),
    "objective": (lambda: FitOptions(objective="mean"), "give one of huber, log_ls, raw_ls, asymmetric"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("error")
def test_bad_input_is_one_clear_message(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(UserError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("error")
def test_predictions_refuse_what_is_no_input() -> None:
    found = laws.fit_chinchilla(s.SIZES, s.TOKENS, LOSS, options=QUICK)
    with pytest.raises(UserError, match="1 inputs; give N, D"):
        found.predict(1e8)
    with pytest.raises(UserError, match="N: must be finite and above 0"):
        found.predict(-1e8, 1e9)
    with pytest.raises(UserError, match="no bootstrap, so no intervals"):
        found.predict_interval(1e8, 1e9)


@pytest.mark.filterwarnings("error")
def test_odd_runs_end_in_a_fit_without_foreign_warnings() -> None:
    """Losses that grow with size, and such that do not change at all."""
    for loss in (LOSS[::-1], np.full(36, 3.0)):
        found = laws.fit_power(s.SIZES, loss, options=SOME)
        assert np.isfinite(found.objective)
        assert found.flags
