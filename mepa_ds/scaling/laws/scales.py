"""One law a scale of a VAR model, and whether together they are the law of the mean.

Shapes: R runs, K scales, N rows (R * K when exponents are shared), P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from mepa_ds.errors import UserError
from mepa_ds.scaling.laws.chinchilla import ChinchillaFit, centred, fit_chinchilla
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
from mepa_ds.scaling.laws.power import STEEPEST

DISAGREEMENT = 0.005
"""A flag is set where the laws' weighted sum and the law of the mean differ by more than this share at a run."""
_SHARED_DRAWS = 200  # of 3 K + 2 parameters at once


@dataclass(frozen=True, kw_only=True)
class ScalesFit(Fit):
    """L_k = E_k + A_k N^-alpha_k + B_k D^-beta_k of each scale k, coarsest first.

    `E`, `A`, `B`, `alpha` and `beta` have one entry a scale, and `intervals` the names E_1 ... beta_K; shared exponents
    are alpha and beta there. `predict(N, D)` is the token-weighted mean of the scales, `predict_scales` each of them.
    `mean` is the fit of the mean losses, and `disagreement` the largest |sum / mean - 1| among the runs.
    `objective` sums over runs and scales, and `residuals` has the scales of the first run first.
    """

    law: ClassVar[str] = "var"
    parameter_names: ClassVar[tuple[str, ...]] = ("E", "A", "B", "alpha", "beta")
    input_names: ClassVar[tuple[str, ...]] = ("N", "D")

    E: tuple[float, ...]
    A: tuple[float, ...]
    B: tuple[float, ...]
    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    tokens_of_scale: tuple[int, ...]
    shared_exponents: bool
    mean: ChinchillaFit
    disagreement: float

    @classmethod
    def formula(cls, parameters: Mapping[str, Any], *inputs: Any) -> Any:
        """The losses of the scales, in a last axis; parameters (..., K)."""
        N, D = (np.asarray(value)[..., None] for value in inputs)
        return ChinchillaFit.formula(parameters, N, D)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters by name, arrays (K,)."""
        return {name: np.asarray(getattr(self, name)) for name in self.parameter_names}

    def predict_scales(self, N: ArrayLike, D: ArrayLike) -> Array:
        """(..., K): the loss of each scale. Raises UserError as `predict`."""
        found: Array = self.formula(self.parameters, *self._inputs((N, D)))
        return found

    def predict(self, *inputs: ArrayLike) -> Any:
        """The mean loss over tokens. Raises UserError for inputs that are no numbers above 0."""
        found = self.predict_scales(*inputs) @ _weights(self.tokens_of_scale)
        return float(found) if np.ndim(found) == 0 else found

    def predict_interval(self, *inputs: ArrayLike, level: float | None = None, noise: bool = True) -> tuple[Any, Any]:
        """(low, high) of the mean loss: that of the fit of the mean (`Fit.predict_interval`)."""
        return self.mean.predict_interval(*inputs, level=level, noise=noise)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ScalesFit:
        """What `to_dict` gave. Raises UserError for anything else."""
        mean = data.get("mean")
        found = super().from_dict({**data, "mean": None})
        return found if mean is None else replace(found, mean=ChinchillaFit.from_dict(mean))


def fit_scales(
    N: ArrayLike,
    D: ArrayLike,
    loss_by_scale: ArrayLike,
    tokens_of_scale: ArrayLike,
    *,
    shared_exponents: bool = False,
    **settings: Any,
) -> ScalesFit:
    """Fits a law to each scale, and one to their mean.

    Args:
        N: (R,) weights of each run.
        D: (R,) tokens that each run has seen.
        loss_by_scale: (R, K) loss of each scale in nats.
        tokens_of_scale: (K,) tokens of each scale, as 1, 4, 9, ...
        shared_exponents: one alpha and one beta for all scales.
        settings: `cluster` and `options`, as for `fit_chinchilla`.

    Raises:
        UserError: shapes that do not fit, and all that `fit_chinchilla` refuses.
    """
    options, cluster = settings.pop("options", None) or FitOptions(), settings.pop("cluster", None)
    if settings:
        raise UserError(f"var: unknown arguments {', '.join(settings)}; cluster and options are the others")
    losses_RK, tokens_K = _checked(N, D, loss_by_scale, tokens_of_scale)
    mean = fit_chinchilla(N, D, losses_RK @ _weights(tuple(tokens_K)), cluster=cluster, options=options)
    columns = numbers("var", {"N": N, "D": D})
    fit = _shared if shared_exponents else _apart
    values = fit(columns["N"], columns["D"], losses_RK, cluster, options)
    result = ScalesFit(
        **values,
        tokens_of_scale=tuple(int(count) for count in tokens_K),
        shared_exponents=shared_exponents,
        mean=mean,
        disagreement=0.0,
    )
    ratio = result.predict(columns["N"], columns["D"]) / mean.predict(columns["N"], columns["D"])
    worst = float(np.abs(np.asarray(ratio) - 1).max())
    flags = [*result.flags, *(f"Mean: {flag}" for flag in mean.flags)]
    if worst > DISAGREEMENT:
        flags.append(
            f"The token-weighted sum of the scales' laws and the law of the mean differ by up to {worst:.2%} at a run "
            f"(allowed: {DISAGREEMENT:.1%}): one of them does not describe the runs."
        )
    return replace(result, disagreement=worst, flags=tuple(flags))


def _weights(tokens: tuple[float, ...]) -> Array:
    counts = np.asarray(tokens, np.float64)
    return counts / counts.sum()


def _checked(N: ArrayLike, D: ArrayLike, loss_by_scale: ArrayLike, tokens_of_scale: ArrayLike) -> tuple[Array, Array]:
    try:
        losses, tokens = np.asarray(loss_by_scale, np.float64), np.asarray(tokens_of_scale, np.float64)
    except (TypeError, ValueError):
        raise UserError("var: loss_by_scale or tokens_of_scale: not numbers; give arrays of numbers") from None
    if losses.ndim != 2 or tokens.shape != losses.shape[1:] or len(losses) != np.size(N):
        raise UserError(
            f"var: loss_by_scale has shape {losses.shape}, tokens_of_scale {tokens.shape}, N {np.shape(N)}; give "
            "(runs, scales), (scales,) and (runs,)"
        )
    numbers("var", {"tokens_of_scale": tokens})
    for scale in range(losses.shape[1]):
        numbers("var", {"N": N, "D": D, f"loss_by_scale[:, {scale}]": losses[:, scale]})
    return losses, tokens


def _apart(N: Array, D: Array, losses_RK: Array, cluster: Any, options: FitOptions) -> dict[str, Any]:
    """One fit a scale."""
    fits = [fit_chinchilla(N, D, losses, cluster=cluster, options=options) for losses in losses_RK.T]
    names = ChinchillaFit.parameter_names
    residuals = np.array([fit.residuals for fit in fits]).T
    return {
        **{name: tuple(getattr(fit, name) for fit in fits) for name in names},
        "objective": sum(fit.objective for fit in fits),
        "options": options,
        "intervals": {f"{name}_{k}": ends for k, fit in enumerate(fits, 1) for name, ends in fit.intervals.items()},
        "flags": tuple(f"Scale {k}: {flag}" for k, fit in enumerate(fits, 1) for flag in fit.flags),
        "num_rows": len(N),
        "num_free": sum(fit.num_free for fit in fits),
        "num_starts": fits[0].num_starts,
        "starts_at_optimum": min(fit.starts_at_optimum for fit in fits),
        "residuals": tuple(residuals.ravel().tolist()),
        "ranges": fits[0].ranges,
        "draws": {f"{name}_{k}": values for k, fit in enumerate(fits, 1) for name, values in fit.draws.items()},
        "inflation": max(fit.inflation for fit in fits),
    }


def _shared(N: Array, D: Array, losses_RK: Array, cluster: Any, options: FitOptions) -> dict[str, Any]:
    """All scales at once: e_k, a_k, b_k of each scale, then alpha and beta."""
    R, K = losses_RK.shape
    check_points("var", R, 6, "one more than the parameters of a scale")
    check_sizes("var", {"N": N, "D": D}, 3)
    check_not_collinear("var", N, D)
    check_units("var", N, D)
    options = replace(options, draws=min(options.draws, _SHARED_DRAWS))
    columns = {"N": np.repeat(N, K), "D": np.repeat(D, K), "scale": np.tile(np.arange(1.0, K + 1), R)}
    runs = labels("var", cluster, R)
    rows = Rows.of(columns, losses_RK.ravel(), np.repeat(runs, K))
    scale = rows.columns["scale"].astype(int) - 1
    (x, x0), (y, y0) = (centred(rows.columns[name]) for name in ("N", "D"))
    design = np.zeros((R * K, 3, 3 * K + 2))
    for term in range(3):
        design[np.arange(R * K), term, 3 * scale + term] = 1
    design[:, 1, -2], design[:, 2, -1] = -x, -y
    low, high = coefficient_range(rows.loss_N)
    box = Box(np.array([low] * 3 * K + [0.0] * 2), np.array([high] * 3 * K + [STEEPEST] * 2))
    middle = np.repeat(np.log(losses_RK).mean(0), 3)
    starts = (np.append(middle - np.log(50), [0.05, 0.05]), np.append(middle, [1.0, 1.0]))
    # No term has a coefficient to itself, as each is of all scales: the starts are points of the box.
    form = Form(LogSum(design), box, *starts, (-1,) * 3)
    parameters: dict[str, Parameter] = {}
    for k in range(K):
        parameters[f"E_{k + 1}"] = coefficient(3 * k)
        parameters[f"A_{k + 1}"] = coefficient(3 * k + 1, lambda theta: theta[:, -2] * x0)
        parameters[f"B_{k + 1}"] = coefficient(3 * k + 2, lambda theta: theta[:, -1] * y0)
    parameters |= {"alpha": exponent(3 * K), "beta": exponent(3 * K + 1)}
    _, values = fit_form(form, rows, parameters, options)
    found = {name: values.pop(name) for name in parameters}
    values["num_rows"] = R
    values["ranges"].pop("scale")
    return values | {
        **{name: tuple(found[f"{name}_{k + 1}"] for k in range(K)) for name in ("E", "A", "B")},
        "alpha": (found["alpha"],) * K,
        "beta": (found["beta"],) * K,
    }
