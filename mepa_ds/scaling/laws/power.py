"""A power law in one input: L = E + A x^-alpha.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from mepa_ds.errors import UserError
from mepa_ds.scaling.laws.fitting.assemble import coefficient, exponent, fit_form
from mepa_ds.scaling.laws.fitting.checks import Array, check_points, check_sizes, labels, numbers
from mepa_ds.scaling.laws.fitting.logsum import LogSum
from mepa_ds.scaling.laws.fitting.minimise import Box
from mepa_ds.scaling.laws.fitting.options import FitOptions
from mepa_ds.scaling.laws.fitting.result import Fit
from mepa_ds.scaling.laws.fitting.rows import Rows
from mepa_ds.scaling.laws.fitting.solve import Form, coefficient_range

STEEPEST = 5.0
"""Exponents are looked for between 0 and this."""


@dataclass(frozen=True, kw_only=True)
class PowerFit(Fit):
    """L = E + A x^-alpha. E in nats a token, A in nats times the unit of x to the alpha."""

    law: ClassVar[str] = "power"
    parameter_names: ClassVar[tuple[str, ...]] = ("E", "A", "alpha")
    input_names: ClassVar[tuple[str, ...]] = ("x",)

    E: float
    A: float
    alpha: float

    @classmethod
    def formula(cls, parameters: Mapping[str, Any], *inputs: Any) -> Any:
        """E + A x^-alpha."""
        (x,) = inputs
        return parameters["E"] + parameters["A"] * x ** -parameters["alpha"]


def fit_power(
    x: ArrayLike, loss: ArrayLike, *, E: float | None = None, cluster: Any = None, options: FitOptions | None = None
) -> PowerFit:
    """Fits L = E + A x^-alpha to runs.

    Args:
        x: (N,) weights, tokens or FLOPs of each run, above 0.
        loss: (N,) loss of each run in nats, above 0.
        E: the irreducible loss; None fits it, 0 leaves it out, another number pins it.
        cluster: (N,) labels of runs that differ in their seed alone; the bootstrap draws them together.

    Raises:
        UserError: fewer than 4 runs or 3 sizes (3 and 2 with E given), bad values, an E not below all losses.
    """
    options = options or FitOptions()
    given = numbers("power", {"x": x, "loss": loss})
    check_points("power", len(given["x"]), 4 if E is None else 3, "one more than its parameters")
    check_sizes("power", {"x": given["x"]}, 3 if E is None else 2)
    check_pinned("power", E, given["loss"])
    rows = Rows.of({"x": given["x"]}, given["loss"], labels("power", cluster, len(given["x"])))
    log_x = np.log(rows.columns["x"])
    centre = float(log_x.mean())
    zero, one = np.zeros_like(log_x), np.ones_like(log_x)
    # Parameters: e, a, alpha.
    design = np.stack([np.stack([one, zero, zero], 1), np.stack([zero, one, centre - log_x], 1)], 1)
    low, high = coefficient_range(rows.loss_N)
    box = Box(np.array([low, low, 0.0]), np.array([high, high, STEEPEST]))
    form = Form(LogSum(design), pin(box, 0, E, low), *start_box(rows.loss_N, 2, ((0.02, 1.5),)), (0, 1))
    parameters = {
        "E": coefficient(0),
        "A": coefficient(1, lambda theta: theta[:, 2] * centre),
        "alpha": exponent(2),
    }
    _, values = fit_form(form, rows, parameters, options)
    return PowerFit(**exactly(values, E=E))


def check_pinned(law: str, E: float | None, loss_N: Array) -> None:
    """Raises UserError where the given E is negative, no number, or not below all losses."""
    if E is not None and not 0 <= E < loss_N.min():
        raise UserError(
            f"{law}: E: {E!r} is not allowed; it must be at least 0 and below all losses ({loss_N.min():g})"
        )


def pin(box: Box, column: int, value: float | None, zero: float) -> Box:
    """The box with the log coefficient of a column at that of `value`; None leaves it free."""
    if value is None:
        return box
    lower, upper = box.lower_P.copy(), box.upper_P.copy()
    lower[column] = upper[column] = np.log(value) if value > 0 else zero
    return Box(lower, upper)


def start_box(loss_N: Array, num_coefficients: int, exponents: tuple[tuple[float, float], ...]) -> tuple[Array, Array]:
    """Where starts lie: log coefficients from a 50th of the losses to all of them, and ranges of exponents."""
    middle = float(np.log(loss_N).mean())
    low = [middle - np.log(50)] * num_coefficients + [pair[0] for pair in exponents]
    high = [middle] * num_coefficients + [pair[1] for pair in exponents]
    return np.array(low), np.array(high)


def exactly(values: dict[str, Any], **pinned: float | None) -> dict[str, Any]:
    """Parameters that were given are those numbers, and not exp(log(...)) of them."""
    return values | {name: float(value) for name, value in pinned.items() if value is not None}
