"""From a solution to what a result says: intervals, flags, residuals.

Shapes: N rows, P parameters, B bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mepa_ds.scaling.laws.fitting.options import FitOptions
from mepa_ds.scaling.laws.fitting.result import tail_share
from mepa_ds.scaling.laws.fitting.rows import Rows
from mepa_ds.scaling.laws.fitting.solve import Form, Solution, solve

Array = NDArray[np.float64]
_OUTLIER = 5.0  # robust standard deviations
_FEW_STARTS = 0.1
_AT_EDGE = 1e-6


@dataclass(frozen=True)
class Parameter:
    """How a parameter of a result follows from the internal ones.

    Args:
        column: the internal parameter that bounds it.
        value: internal parameters (S, P) to its values (S,).
        zero: what it is where the internal one is at its lower bound, as 0.0 for a coefficient; None: `value`.
        floor: the lower end of an interval that the runs do not bound.
    """

    column: int
    value: Callable[[Array], Array]
    zero: float | None = None
    floor: float = -np.inf

    def of(self, theta_SP: Array, lower: float) -> Array:
        with np.errstate(all="ignore"):
            values = np.asarray(self.value(theta_SP), np.float64)
        return values if self.zero is None else np.where(theta_SP[:, self.column] <= lower, self.zero, values)


def exponent(column: int, sign: float = 1.0) -> Parameter:
    """A parameter that is an internal one, or its negative."""
    return Parameter(column, lambda theta: sign * theta[:, column])


def coefficient(column: int, shift: Callable[[Array], Array] | None = None) -> Parameter:
    """exp of an internal parameter; `shift` (S,) is added to it first: what centring has taken away."""
    if shift is None:
        return Parameter(column, lambda theta: np.exp(theta[:, column]), 0.0, 0.0)
    return Parameter(column, lambda theta: np.exp(theta[:, column] + shift(theta)), 0.0, 0.0)


def fit_form(
    form: Form, rows: Rows, parameters: Mapping[str, Parameter], options: FitOptions
) -> tuple[Solution, dict[str, Any]]:
    """The solution, and the fields of `Fit` together with the law's parameters."""
    solution = solve(form, rows, options)
    lower, upper = form.box.lower_P, form.box.upper_P
    freedom = len(rows.loss_N) - form.num_free
    inflation = rows.inflation() * float(np.sqrt(len(rows.loss_N) / max(freedom, 1)))
    tail = tail_share(options.level, freedom, inflation)
    values: dict[str, float] = {}
    draws: dict[str, tuple[float, ...]] = {}
    intervals: dict[str, tuple[float, float]] = {}
    flags: list[str] = []
    for name, parameter in parameters.items():
        column = parameter.column
        values[name] = float(parameter.of(solution.theta_P[None], lower[column])[0])
        draws_B = parameter.of(solution.draws_BP, lower[column])
        if options.draws:
            draws[name] = tuple(draws_B.tolist())
        if lower[column] == upper[column]:
            continue
        flags += _edge_flags(name, parameter, solution, (lower[column], upper[column]))
        if options.draws:
            intervals[name], told = _interval(name, parameter, solution, (lower[column], upper[column]), draws_B, tail)
            flags += told
    residuals_N = rows.log_loss_N - form.model.log_loss(solution.theta_P[None])[0]
    if solution.starts_at_optimum < max(2, _FEW_STARTS * solution.num_starts):
        flags.append(
            f"Only {solution.starts_at_optimum} of {solution.num_starts} starts reached the optimum: there may be a "
            "better one."
        )
    flags += _outliers(rows, residuals_N)
    return solution, {
        **values,
        "objective": solution.objective,
        "options": options,
        "intervals": intervals,
        "flags": tuple(flags),
        "num_rows": len(rows.loss_N),
        "num_free": form.num_free,
        "num_starts": solution.num_starts,
        "starts_at_optimum": solution.starts_at_optimum,
        "residuals": rows.unsorted(residuals_N),
        "ranges": {name: (float(column.min()), float(column.max())) for name, column in rows.columns.items()},
        "draws": draws,
        "inflation": inflation,
    }


def _edge_flags(name: str, parameter: Parameter, solution: Solution, box: tuple[float, float]) -> list[str]:
    at = solution.theta_P[parameter.column]
    if at <= box[0] and parameter.zero is not None:
        return [f"{name} is at 0: the runs show no sign of this term."]
    if solution.flat_P[parameter.column]:
        return [f"{name} is not determined: no run's loss depends on it."]
    if at <= box[0] + _AT_EDGE or at >= box[1] - _AT_EDGE:
        return [f"{name} is at a bound of its range: the runs do not determine it."]
    return []


def _interval(
    name: str, parameter: Parameter, solution: Solution, box: tuple[float, float], draws_B: Array, tail: float
) -> tuple[tuple[float, float], list[str]]:
    """Quantiles of the draws. An end that the draws do not bound is infinite, or the parameter's floor."""
    inner, flat = solution.draws_BP[:, parameter.column], solution.flat_BP[:, parameter.column]
    at_zero = inner <= box[0] if parameter.zero is not None else np.zeros(len(inner), bool)
    low, high = (float(end) for end in np.quantile(draws_B, [tail, 1 - tail], method="median_unbiased"))
    # Draws in which the loss does not depend on the parameter say that it may be anything.
    free = float((flat & ~at_zero).mean()) > tail or not np.isfinite(draws_B).all()
    below = free or float((inner <= box[0] + _AT_EDGE).mean()) > tail
    above = free or float((inner >= box[1] - _AT_EDGE).mean()) > tail
    # Where the parameter falls as the internal one rises, the edges change places.
    probe = np.repeat(solution.theta_P[None], 2, 0)
    probe[:, parameter.column] += [0.0, 0.01]
    first, second = parameter.value(probe)
    if second < first:
        below, above = above, below
    if below:
        low = parameter.floor
    if above:
        high = np.inf
    if not np.isfinite([low, high]).all():
        return (low, high), [f"The interval of {name} is unbounded: the runs do not determine it."]
    return (low, high), [f"The interval of {name} reaches 0."] if below else []


def _outliers(rows: Rows, residuals_N: Array) -> list[str]:
    """Rows far from the law, next to the median distance of all; rounding is no distance."""
    sizes = np.abs(residuals_N)
    deviation = 1.4826 * float(np.median(sizes))
    far = np.flatnonzero(sizes > max(_OUTLIER * deviation, 1e-6))
    if not len(far):
        return []
    told = ", ".join(
        f"{row} ({residuals_N[index]:+.1%})" for row, index in sorted((int(rows.order_N[i]), i) for i in far)
    )
    return [f"Runs further than {_OUTLIER:g} deviations from the law, by row: {told}."]
