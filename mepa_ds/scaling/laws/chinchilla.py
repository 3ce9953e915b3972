"""The law of size and data: L = E + A N^-alpha + B D^-beta (Hoffmann et al., arXiv 2203.15556, equation 2).

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from mepa_ds.errors import UserError
from mepa_ds.scaling.laws.fitting.assemble import Parameter, coefficient, exponent, fit_form
from mepa_ds.scaling.laws.fitting.checks import (
    Array,
    check_not_collinear,
    check_points,
    check_sizes,
    check_units,
    labels,
    numbers,
)
from mepa_ds.scaling.laws.fitting.logsum import LogSum
from mepa_ds.scaling.laws.fitting.minimise import Box
from mepa_ds.scaling.laws.fitting.options import FitOptions
from mepa_ds.scaling.laws.fitting.result import Fit
from mepa_ds.scaling.laws.fitting.rows import Rows
from mepa_ds.scaling.laws.fitting.solve import Form, coefficient_range
from mepa_ds.scaling.laws.power import STEEPEST, check_pinned, exactly, pin, start_box

FLOPS_PER = 6.0
"""FLOPs a weight and token: a forward pass is 2, a backward pass 4."""


@dataclass(frozen=True)
class Optimum:
    """The best split of a budget: weights N, tokens D, the law's loss there. Unpacks as N, D, loss.

    `intervals` of the three at the fit's level (empty without a bootstrap), and `flags`.
    """

    N: float
    D: float
    loss: float
    intervals: Mapping[str, tuple[float, float]]
    flags: tuple[str, ...]

    def __iter__(self) -> Iterator[float]:
        return iter((self.N, self.D, self.loss))


@dataclass(frozen=True, kw_only=True)
class ChinchillaFit(Fit):
    """L = E + A N^-alpha + B D^-beta. A and B are in nats times the units of N and D to their exponents."""

    law: ClassVar[str] = "chinchilla"
    parameter_names: ClassVar[tuple[str, ...]] = ("E", "A", "B", "alpha", "beta")
    input_names: ClassVar[tuple[str, ...]] = ("N", "D")

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    tied: bool = False

    @classmethod
    def formula(cls, parameters: Mapping[str, Any], *inputs: Any) -> Any:
        """E + A N^-alpha + B D^-beta."""
        N, D = inputs
        p = parameters
        return p["E"] + p["A"] * N ** -p["alpha"] + p["B"] * D ** -p["beta"]

    @property
    def a(self) -> float:
        """The exponent of the best size: N* grows as C^a, a = beta / (alpha + beta) (equation 4)."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, C: float, flops_per: float = FLOPS_PER) -> Optimum:
        """The N and D of least loss with flops_per * N * D = C.

        Args:
            C: FLOPs of the whole run.
            flops_per: FLOPs a weight and token; 6 for a dense transformer whose N is `params_matrix`. Real models have
                attention besides: take what their counted FLOPs give.

        Raises:
            UserError: C or flops_per not above 0; an exponent or coefficient at 0, so that there is no optimum.
        """
        for name, value in (("C", C), ("flops_per", flops_per)):
            if not (np.isfinite(value) and value > 0):
                raise UserError(f"chinchilla: {name}: {value!r} is not allowed; give a number above 0")
        if min(self.A, self.B, self.alpha, self.beta) <= 0:
            raise UserError("chinchilla: a term of the law is 0, so no split of the budget is the best one")
        product = C / flops_per
        best = _split(self.parameters, product)
        intervals = {}
        if self.draws:
            drawn = {name: np.asarray(values) for name, values in self.draws.items()}
            with np.errstate(all="ignore"):
                found = _split(drawn, product)
            tail = self.tail()
            for name, values in zip(("N", "D", "loss"), found, strict=True):
                good = values[np.isfinite(values)]
                if len(good) == len(values):
                    low, high = np.quantile(good, [tail, 1 - tail], method="median_unbiased")
                    intervals[name] = (float(low), float(high))
                else:
                    intervals[name] = (0.0, float("inf"))
        N, D, loss = (float(value) for value in best)
        return Optimum(N, D, loss, intervals, tuple(self._outside({"N": N, "D": D})))

    def _outside(self, place: Mapping[str, float]) -> Iterator[str]:
        for name, value in place.items():
            low, high = self.ranges[name]
            if not low <= value <= high:
                yield f"The optimum's {name} = {value:.3g} lies outside the sampled range, {low:.3g} to {high:.3g}."


def _split(p: Mapping[str, Any], product: float) -> tuple[Any, Any, Any]:
    """N, D and loss at the best split of N * D = product (equation 4)."""
    log_n = (np.log(p["alpha"] * p["A"] / (p["beta"] * p["B"])) + p["beta"] * np.log(product)) / (
        p["alpha"] + p["beta"]
    )
    N = np.exp(log_n)
    return N, product / N, ChinchillaFit.formula(p, N, product / N)


def fit_chinchilla(
    N: ArrayLike,
    D: ArrayLike,
    loss: ArrayLike,
    *,
    E: float | None = None,
    tied: bool = False,
    cluster: Any = None,
    options: FitOptions | None = None,
) -> ChinchillaFit:
    """Fits L = E + A N^-alpha + B D^-beta to runs.

    Args:
        N: (N,) weights of each run (`params_matrix`), above 0.
        D: (N,) tokens that each run has seen.
        loss: (N,) loss of each run in nats, above 0.
        E: the irreducible loss; None fits it, 0 leaves it out, another number pins it.
        tied: one exponent for both terms.
        cluster: (N,) labels of runs that differ in their seed alone; the bootstrap draws them together.

    Raises:
        UserError: fewer runs than one more than the parameters (6 of them; 5 when tied or with E given), fewer than 3
            sizes or lengths (2 with E given), log N and log D collinear, units that cannot be, bad values.
    """
    options = options or FitOptions()
    rows = rows_of_sizes("chinchilla", {"N": N, "D": D, "loss": loss}, cluster, 6 - tied - (E is not None))
    check_sizes("chinchilla", rows.columns, 3 if E is None else 2)
    check_not_collinear("chinchilla", rows.columns["N"], rows.columns["D"])
    check_pinned("chinchilla", E, rows.loss_N)
    form, parameters = chinchilla_form(rows, tied)
    form = Form(form.model, pin(form.box, 0, E, form.box.lower_P[0]), form.lowest_P, form.highest_P, form.coefficients)
    _, values = fit_form(form, rows, parameters, options)
    return ChinchillaFit(**exactly(values, E=E), tied=tied)


def rows_of_sizes(law: str, columns: Mapping[str, ArrayLike], cluster: Any, needed: int) -> Rows:
    """Rows of N, D, perhaps more, and loss, checked for what no law allows; `needed` runs at least."""
    given = numbers(law, columns)
    loss = given.pop("loss")
    check_points(law, len(loss), needed, "one more than its parameters")
    check_units(law, given["N"], given["D"])
    return Rows.of(given, loss, labels(law, cluster, len(loss)))


def chinchilla_form(rows: Rows, tied: bool) -> tuple[Form, dict[str, Parameter]]:
    """Internal parameters e, a, b, alpha, beta (one exponent when tied), at centred log N and log D."""
    (x, x0), (y, y0) = (centred(rows.columns[name]) for name in ("N", "D"))
    columns = 4 if tied else 5
    design = np.zeros((len(x), 3, columns))
    design[:, 0, 0] = design[:, 1, 1] = design[:, 2, 2] = 1
    design[:, 1, 3], design[:, 2, -1] = -x, -y
    low, high = coefficient_range(rows.loss_N)
    box = Box(np.array([low] * 3 + [0.0] * (columns - 3)), np.array([high] * 3 + [STEEPEST] * (columns - 3)))
    starts = start_box(rows.loss_N, 3, ((0.02, 1.2),) * (columns - 3))
    parameters = {
        "E": coefficient(0),
        "A": coefficient(1, lambda theta: theta[:, 3] * x0),
        "B": coefficient(2, lambda theta: theta[:, -1] * y0),
        "alpha": exponent(3),
        "beta": exponent(columns - 1),
    }
    return Form(LogSum(design), box, *starts, (0, 1, 2)), parameters


def centred(values: Array) -> tuple[Array, float]:
    """log values minus their mean, and that mean."""
    logs = np.log(values)
    mean = float(logs.mean())
    return logs - mean, mean
