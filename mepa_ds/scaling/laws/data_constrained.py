"""The law of repeated data (Muennighoff et al., arXiv 2305.16264, equations 5 to 7).

L = E + A / N'^alpha + B / D'^beta, where D' = U_D + U_D R*_D (1 - exp(-R_D / R*_D)) counts R_D repeats of U_D unique
tokens for less and less, and N' likewise counts the weights beyond U_N, the best size for U_D tokens seen once.

Shapes: S fits side by side, N rows, K terms, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from mepa_ds.errors import UserError
from mepa_ds.scaling.laws.chinchilla import ChinchillaFit, centred, fit_chinchilla, rows_of_sizes
from mepa_ds.scaling.laws.fitting.assemble import Parameter, coefficient, exponent, fit_form
from mepa_ds.scaling.laws.fitting.checks import check_not_collinear, check_sizes, numbers
from mepa_ds.scaling.laws.fitting.effective import EffectiveInputs
from mepa_ds.scaling.laws.fitting.logsum import LogSum
from mepa_ds.scaling.laws.fitting.minimise import Box
from mepa_ds.scaling.laws.fitting.options import FitOptions
from mepa_ds.scaling.laws.fitting.result import Fit
from mepa_ds.scaling.laws.fitting.rows import Rows
from mepa_ds.scaling.laws.fitting.solve import Form, coefficient_range
from mepa_ds.scaling.laws.power import STEEPEST, exactly, start_box

_SHARED = ("E", "A", "B", "alpha", "beta")
_FLATTEST = 1e-3  # the best size for some tokens has alpha in a denominator
_REPEATS = (np.log(0.01), np.log(1e5))
_START_REPEATS = (np.log(0.5), np.log(300))


@dataclass(frozen=True, kw_only=True)
class DataConstrainedFit(Fit):
    """The law of repeated data. `RN_star` and `RD_star` are R*_N and R*_D: repeats after which 1 - 1/e of all that
    repeating can give has been had. `base`: E, A, B, alpha and beta were given, not fitted here.
    """

    law: ClassVar[str] = "data"
    parameter_names: ClassVar[tuple[str, ...]] = (*_SHARED, "RN_star", "RD_star")
    input_names: ClassVar[tuple[str, ...]] = ("N", "D", "unique")

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    RN_star: float
    RD_star: float
    tied: bool
    base: bool

    @classmethod
    def formula(cls, parameters: Mapping[str, Any], *inputs: Any) -> Any:
        """The law; `unique` may exceed D, then D tokens are unique."""
        N, D, unique = inputs
        p = parameters
        unique = np.minimum(unique, D)
        best = np.exp((np.log(p["alpha"] * p["A"] / (p["beta"] * p["B"])) + p["beta"] * np.log(unique)) / p["alpha"])
        size = effective(N, np.minimum(N, best), p["RN_star"])
        data = effective(D, unique, p["RD_star"])
        return p["E"] + p["A"] * size ** -p["alpha"] + p["B"] * data ** -p["beta"]

    def effective_data(self, D: ArrayLike, unique: ArrayLike) -> Any:
        """D': as many unique tokens as would give what D tokens of `unique` give."""
        D, unique = np.asarray(D, np.float64), np.asarray(unique, np.float64)
        return effective(D, np.minimum(unique, D), self.RD_star)


def effective(total: Any, unique: Any, star: Any) -> Any:
    """U + U R* (1 - exp(-R / R*)) with R = total / U - 1 (equation 5)."""
    return unique * (1 - star * np.expm1(-(total / unique - 1) / star))


def fit_data_constrained(
    N: ArrayLike,
    D: ArrayLike,
    unique: ArrayLike,
    loss: ArrayLike,
    *,
    tied: bool = False,
    base: ChinchillaFit | Mapping[str, float] | Literal["single_epoch"] | None = None,
    **settings: Any,
) -> DataConstrainedFit:
    """Fits the law of repeated data to runs.

    All seven parameters are fitted together, U_N following from the law's own alpha, beta, A and B. The paper ties
    alpha to beta, fits the first five parameters to the runs of one epoch, and the R* to the others: that is
    `tied=True, base="single_epoch"`.

    Args:
        N: (N,) weights of each run.
        D: (N,) tokens that each run has seen, repeats counted.
        unique: (N,) tokens of its training set.
        loss: (N,) loss of each run in nats.
        tied: one exponent for both terms.
        base: E, A, B, alpha and beta as given numbers; "single_epoch" fits them first, to runs with D <= unique, and
            R* to the rest. Intervals of the R* are then those given the base.
        settings: `cluster` and `options`, as for `fit_chinchilla`.

    Raises:
        UserError: fewer than 8 runs (7 when tied, 3 with a base), no repeated data at all, and all that
            `fit_chinchilla` refuses.
    """
    options, cluster = settings.pop("options", None) or FitOptions(), settings.pop("cluster", None)
    if settings:
        raise UserError(f"data: unknown arguments {', '.join(settings)}; cluster and options are the others")
    columns = {"N": N, "D": D, "unique": unique, "loss": loss}
    if isinstance(base, str):
        return _after_single_epochs(columns, tied, cluster, base, options)
    rows = rows_of_sizes("data", columns, cluster, 3 if base is not None else 8 - tied)
    if not (rows.columns["D"] > rows.columns["unique"] * (1 + 1e-9)).any():
        raise UserError("data: no run has seen its data twice (D is nowhere above unique): fit the law chinchilla")
    if base is None:
        check_sizes("data", {name: rows.columns[name] for name in ("N", "D")}, 3)
        check_not_collinear("data", rows.columns["N"], rows.columns["D"])
    given = _base_values(base)
    form, parameters = _form(rows, tied and base is None, given)
    _, values = fit_form(form, rows, parameters, options)
    return DataConstrainedFit(**exactly(values, **given), tied=tied, base=base is not None)


def _base_values(base: ChinchillaFit | Mapping[str, float] | None) -> dict[str, float]:
    if base is None:
        return {}
    values = base.parameters if isinstance(base, ChinchillaFit) else dict(base)
    if set(values) != set(_SHARED) or not all(np.isfinite(v) and v >= 0 for v in values.values()):
        raise UserError(f"data: base: give a fit of chinchilla or numbers for {', '.join(_SHARED)}, none below 0")
    if min(values[name] for name in _SHARED[1:]) <= 0:
        raise UserError("data: base: a coefficient or exponent is 0: it says nothing of the best size")
    return values


def _after_single_epochs(
    columns: Mapping[str, ArrayLike], tied: bool, cluster: Any, base: str, options: FitOptions
) -> DataConstrainedFit:
    """The paper's order: the Chinchilla law of runs of one epoch, then R* from the others."""
    if base != "single_epoch":
        raise UserError(f"data: base: {base!r} is not allowed; give a fit, numbers, or 'single_epoch'")
    given = numbers("data", columns)
    once = given["D"] <= given["unique"] * (1 + 1e-9)
    labels = np.arange(len(once)) if cluster is None else np.asarray(cluster)
    try:
        first = fit_chinchilla(
            given["N"][once], given["D"][once], given["loss"][once], tied=tied, cluster=labels[once], options=options
        )
    except UserError as error:
        raise UserError(f"data: base 'single_epoch': of the runs that see their data once, {error}") from None
    rest = {name: values[~once] for name, values in given.items()}
    return fit_data_constrained(**rest, base=first, tied=tied, cluster=labels[~once], options=options)


def _form(rows: Rows, tied: bool, given: Mapping[str, float]) -> tuple[Form, dict[str, Parameter]]:
    """Internal parameters e, a, b, alpha, beta, log R*_N, log R*_D, at centred log N and log D."""
    (x, x0), (y, y0) = (centred(rows.columns[name]) for name in ("N", "D"))
    unique = np.minimum(np.log(rows.columns["unique"]) - y0, y)
    # Columns of the seven parameters in what is fitted: one column for both exponents when tied.
    spread = np.eye(7) if not tied else np.eye(7)[:, [0, 1, 2, 3, 5, 6]] + np.eye(7)[:, [4]] * (np.arange(6) == 3)
    design = np.zeros((len(x), 3, 7))
    design[:, 0, 0] = design[:, 1, 1] = design[:, 2, 2] = 1
    warp = EffectiveInputs(x, y, unique, spread)
    low, high = coefficient_range(rows.loss_N)
    lower = np.array([low, low, low, _FLATTEST, _FLATTEST, _REPEATS[0], _REPEATS[0]])
    upper = np.array([high, high, high, STEEPEST, STEEPEST, _REPEATS[1], _REPEATS[1]])
    if given:
        logs = [np.log(max(given[name], 1e-300)) for name in ("E", "A", "B")]
        fixed = [max(logs[0], low), logs[1] - given["alpha"] * x0, logs[2] - given["beta"] * y0]
        lower[:5] = upper[:5] = [*fixed, given["alpha"], given["beta"]]
    own = spread.argmax(0)
    exponents = ((0.05, 1.0),) * (2 - tied)
    starts = start_box(rows.loss_N, 3, (*exponents, _START_REPEATS, _START_REPEATS))
    form = Form(LogSum(design @ spread, warp), Box(lower[own], upper[own]), *starts, (0, 1, 2))
    beta = 4 - tied
    parameters = {
        "E": coefficient(0),
        "A": coefficient(1, lambda theta: theta[:, 3] * x0),
        "B": coefficient(2, lambda theta: theta[:, beta] * y0),
        "alpha": exponent(3),
        "beta": exponent(beta),
        "RN_star": Parameter(beta + 1, lambda theta: np.exp(theta[:, beta + 1]), floor=0.0),
        "RD_star": Parameter(beta + 2, lambda theta: np.exp(theta[:, beta + 2]), floor=0.0),
    }
    return form, parameters
