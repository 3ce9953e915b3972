"""What the laws said of runs that they had not seen, beside what these measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mepa_ds.scaling.laws import Fit

MOST_DEVIATIONS = 3.0
"""A held-out run is right when it lies inside the 95 % interval, or within so many deviations between seeds."""


def compare(
    law: Fit, inputs: Sequence[Any], measured: Any, names: Sequence[str], noise: float | None
) -> list[dict[str, Any]]:
    """Returns, for each run, the law's loss with its interval and the measured one, as `comparison` has them.

    Args:
        law: a law that has not seen the runs.
        inputs: (H,) of each input of the law.
        measured: (H,) losses.
        names: of the runs.
        noise: standard deviation of log loss between seeds; None if no run was repeated.
    """
    predicted = np.atleast_1d(law.predict(*inputs))
    low, high = (np.atleast_1d(end) for end in law.predict_interval(*inputs)) if law.draws else (None, None)
    found = []
    for k, name in enumerate(names):
        ends = None if low is None or high is None else (float(low[k]), float(high[k]))
        found.append(comparison(name, float(measured[k]), float(predicted[k]), ends, noise))
    return found


def comparison(
    run: str, measured: float, predicted: float, ends: tuple[float, float] | None, noise: float | None
) -> dict[str, Any]:
    """Returns one run as JSON.

    `predicted`, `low` and `high` (None without a bootstrap), `measured`, `error` = log(measured / predicted),
    `deviations`: the error in deviations between seeds (None without seeds), `inside` the interval, and `right`:
    inside, or within 3 deviations; None if neither is known.
    """
    low, high = ends or (None, None)
    error = float(np.log(measured / predicted))
    deviations = abs(error) / noise if noise else None
    inside = None if low is None or high is None else bool(low <= measured <= high)
    near = None if deviations is None else deviations <= MOST_DEVIATIONS
    return {
        "run": run, "predicted": predicted, "low": low, "high": high, "measured": measured, "error": error,
        "deviations": deviations, "inside": inside,
        "right": None if inside is None and near is None else bool(inside or near),
    }  # fmt: skip


def verdict(found: dict[str, Any]) -> str:
    """Returns one plain sentence on one comparison."""
    error = f"{100 * np.expm1(found['error']):+.2f} %"
    text = f"{found['run']}: measured {found['measured']:.4f}, predicted {found['predicted']:.4f} ({error})"
    if found["inside"] is not None:
        side = "inside" if found["inside"] else "OUTSIDE"
        text += f": {side} the predicted 95 % interval, {found['low']:.4f} to {found['high']:.4f}"
    else:
        text += "; the law has no interval"
    if found["deviations"] is not None:
        side = "within" if found["deviations"] <= MOST_DEVIATIONS else "NOT within"
        text += f", and {side} 3 deviations between seeds ({found['deviations']:.1f})"
    else:
        text += "; no run was repeated, so nothing says how much of it is noise"
    return text + "."
