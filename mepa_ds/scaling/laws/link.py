"""A score against the reducible loss: score = k (loss - E)^m, a line in logarithms.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from mepa_ds.errors import UserError
from mepa_ds.scaling.laws.fitting.assemble import Parameter, exponent, fit_form
from mepa_ds.scaling.laws.fitting.checks import Array, check_points, check_sizes, labels, numbers
from mepa_ds.scaling.laws.fitting.logsum import LogSum
from mepa_ds.scaling.laws.fitting.minimise import Box
from mepa_ds.scaling.laws.fitting.options import FitOptions
from mepa_ds.scaling.laws.fitting.result import Fit
from mepa_ds.scaling.laws.fitting.rows import Rows
from mepa_ds.scaling.laws.fitting.solve import Form

_STEEPEST = 50.0


@dataclass(frozen=True, kw_only=True)
class LinkFit(Fit):
    """score = k (loss - E)^m. `predict(loss)` is a score."""

    law: ClassVar[str] = "link"
    parameter_names: ClassVar[tuple[str, ...]] = ("k", "m", "E")
    input_names: ClassVar[tuple[str, ...]] = ("loss",)

    k: float
    m: float
    E: float

    @classmethod
    def formula(cls, parameters: Mapping[str, Any], *inputs: Any) -> Any:
        """k (loss - E)^m."""
        return parameters["k"] * (inputs[0] - parameters["E"]) ** parameters["m"]

    def _inputs(self, inputs: tuple[ArrayLike, ...]) -> list[Array]:
        (loss,) = super()._inputs(inputs)
        if (loss <= self.E).any():
            raise UserError(f"link: loss: {loss.min():g} is not above E = {self.E:g}: no score belongs to it")
        return [loss]


def fit_link(
    loss: ArrayLike, E: float, score: ArrayLike, *, cluster: Any = None, options: FitOptions | None = None
) -> LinkFit:
    """Fits log score = log k + m log(loss - E).

    Args:
        loss: (N,) loss of each run in nats, above E.
        E: the irreducible loss, of a law of the same losses.
        score: (N,) a score above 0 whose scale is a ratio: FID, FD, IS, an error rate.
        cluster: (N,) labels of runs that differ in their seed alone; the bootstrap draws them together.

    Raises:
        UserError: fewer than 3 runs, losses at or below E, one loss only, bad values.
    """
    options = options or FitOptions()
    given = numbers("link", {"loss": loss, "score": score})
    check_points("link", len(given["loss"]), 3, "one more than its parameters")
    if not (np.isfinite(E) and 0 <= E < given["loss"].min()):
        raise UserError(
            f"link: E: {E!r} is not allowed; it must be at least 0 and below all losses ({given['loss'].min():g})"
        )
    reducible = given["loss"] - E
    check_sizes("link", {"loss - E": reducible}, 2)
    rows = Rows.of({"loss": given["loss"]}, given["score"], labels("link", cluster, len(reducible)))
    log_x = np.log(rows.columns["loss"] - E)
    centre, middle = float(log_x.mean()), float(rows.log_loss_N.mean())
    design = np.stack([np.ones_like(log_x), log_x - centre, np.zeros_like(log_x)], 1)[:, None]
    box = Box(np.array([middle - 30, -_STEEPEST, 0.0]), np.array([middle + 30, _STEEPEST, 0.0]))
    form = Form(LogSum(design), box, np.array([middle - 1, -3.0, 0.0]), np.array([middle + 1, 3.0, 0.0]), (-1,))
    parameters = {
        "k": Parameter(0, lambda t: np.exp(t[:, 0] - t[:, 1] * centre), floor=0.0),
        "m": exponent(1),
        "E": Parameter(2, lambda t: np.full(len(t), float(E))),
    }
    _, values = fit_form(form, rows, parameters, options)
    return LinkFit(**values)
