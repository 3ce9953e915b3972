"""From a law in its internal parameters to the optimum of its objective, from many starts, and its bootstrap.

Shapes: S starts, N rows, K terms, P parameters, B bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import qmc

from mepa_ds.scaling.laws.fitting.logsum import Derivatives, LogSum
from mepa_ds.scaling.laws.fitting.minimise import Box, Minima, minimise
from mepa_ds.scaling.laws.fitting.options import FitOptions
from mepa_ds.scaling.laws.fitting.rows import Rows

Array = NDArray[np.float64]
REACHED = 1e-6
"""A start has reached the optimum when its objective is within this share of the best."""
_ROUNDING = 1e-20  # a row's share of an objective that is rounding: residuals of 1e-10
DEPTH = 40.0
"""Coefficients reach down to exp(-40) of the smallest loss: below the last digit of any prediction, so 0."""
HEIGHT = 6.0
_NEARLY_ZERO = 15.0
_FLAT = 1e-9
_MANY_PARAMETERS = 9
_COARSE = 1e-6
_FIRST_STEPS = 300
_STEPS, _WARPED = 3000, 500  # narrow valleys, as of a term whose exponent is nearly 0, take up to 1600
_NEAR = 1.1
_FEW = 200


@dataclass(frozen=True)
class Form:
    """A law on one table.

    `lowest` and `highest` (P,) span the starts. `coefficients[k]` is the parameter that is the log coefficient of term
    k, or -1 where a term has none to itself.
    """

    model: LogSum
    box: Box
    lowest_P: Array
    highest_P: Array
    coefficients: tuple[int, ...]

    @property
    def num_free(self) -> int:
        return int((self.box.lower_P < self.box.upper_P).sum())


@dataclass(frozen=True)
class Solution:
    """The optimum (P,), its objective, and the parameters (B, P) of the bootstrap draws.

    `flat_BP` (and `flat_P` at the optimum): where no loss in the draw depends on the parameter.
    """

    theta_P: Array
    objective: float
    num_starts: int
    starts_at_optimum: int
    draws_BP: Array
    flat_P: NDArray[np.bool_]
    flat_BP: NDArray[np.bool_]


def coefficient_range(loss_N: Array) -> tuple[float, float]:
    """Bounds of the logarithm of a coefficient, at centred inputs: from what adds nothing to far above all losses."""
    return float(np.log(loss_N.min())) - DEPTH, float(np.log(loss_N.max())) + HEIGHT


def solve(form: Form, rows: Rows, options: FitOptions) -> Solution:
    """The best of all starts, polished, and the draws of the bootstrap that start from it."""
    plain = _problem(form, rows, np.ones((1, len(rows.loss_N))), options)
    starts = _starts(form, rows, options.num_starts)
    scale = _ROUNDING * 1e-8 * len(rows.loss_N)
    found = _descend(plain, starts, form, scale)
    around = _perturbed(found.theta_SP[found.value_S.argmin()], 16, 0.3)
    again = minimise(
        plain,
        np.concatenate([found.theta_SP[[found.value_S.argmin()]], around]),
        form.box,
        scale,
        max_steps=_FIRST_STEPS,
    )
    found = Minima(np.concatenate([again.theta_SP, found.theta_SP]), np.concatenate([again.value_S, found.value_S]))
    best, value = found.theta_SP[found.value_S.argmin()], float(found.value_S.min())
    best, value = _zeros(form, rows, plain, best, value, scale)
    reached = found.value_S[len(again.value_S) :] <= value * (1 + REACHED) + _ROUNDING * len(rows.loss_N)
    flat_P = _flat(form, rows, best[None], np.ones((1, len(rows.loss_N))))[0]
    if not options.draws:
        empty = np.empty((0, len(best)))
        return Solution(best, value, len(reached), int(reached.sum()), empty, flat_P, empty.astype(bool))
    weights = rows.draw_weights(options.draws, options.seed)
    draws = _bootstrap(form, rows, best, weights, options)
    flat_BP = _flat(form, rows, draws, weights)
    return Solution(best, value, len(reached), int(reached.sum()), draws, flat_P, flat_BP)


def _descend(
    problem: Callable[[Array, NDArray[np.intp]], Derivatives], starts: Array, form: Form, scale: float
) -> Minima:
    """All starts for some steps; then on with those that have come near the best one."""
    found = minimise(problem, starts, form.box, scale, max_steps=_FIRST_STEPS)
    near = np.flatnonzero(found.value_S <= _NEAR * found.value_S.min() + scale)
    theta, value = found.theta_SP.copy(), found.value_S.copy()
    ended = minimise(problem, theta[near], form.box, scale, max_steps=_STEPS if form.model.warp is None else _WARPED)
    theta[near], value[near] = ended.theta_SP, ended.value_S
    return Minima(theta, value)


def _flat(form: Form, rows: Rows, theta_SP: Array, weights_SN: Array) -> NDArray[np.bool_]:
    """(S, P): parameters whose change by 1 changes no drawn row's log loss by more than 1e-9."""
    options = FitOptions(objective="log_ls")
    found = form.model.derivatives(theta_SP, rows.log_loss_N, weights_SN, options)
    result: NDArray[np.bool_] = np.diagonal(found.metric_SPP, axis1=1, axis2=2) < _FLAT**2
    return result


def _problem(
    form: Form, rows: Rows, weights_DN: Array, options: FitOptions, times: int = 1
) -> Callable[[Array, NDArray[np.intp]], Derivatives]:
    """The objective of fits numbered so that `times` starts of each draw follow one another; or one draw for all."""
    target = rows.log_loss_N

    def evaluate(theta_SP: Array, which_S: NDArray[np.intp]) -> Derivatives:
        weights = weights_DN[which_S // times] if len(weights_DN) > 1 else np.repeat(weights_DN, len(which_S), 0)
        return form.model.derivatives(theta_SP, target, weights, options)

    return evaluate


def _starts(form: Form, rows: Rows, count: int) -> Array:
    """Sobol points in the starts' box. In half of them the coefficients are the best ones for the exponents drawn."""
    low, high = form.lowest_P, form.highest_P
    power = int(np.ceil(np.log2(count)))
    points = qmc.Sobol(len(low), scramble=False).random_base2(power)[:count]
    starts = form.box.clip(low + points * (high - low))
    for index in range(0, count, 2):
        starts[index] = _with_coefficients(form, rows, starts[index])
    return starts


def _with_coefficients(form: Form, rows: Rows, theta_P: Array) -> Array:
    """Non-negative coefficients by least squares of relative errors, given the exponents."""
    own = [k for k, column in enumerate(form.coefficients) if column >= 0]
    columns = [form.coefficients[k] for k in own]
    fixed = form.box.lower_P[columns] == form.box.upper_P[columns]
    theta = theta_P.copy()
    theta[[column for column, pinned in zip(columns, fixed, strict=True) if not pinned]] = 0.0
    relative_NK = np.exp(form.model.term_values(theta[None])[0] - rows.log_loss_N[:, None])
    free = [k for k, pinned in zip(own, fixed, strict=True) if not pinned]
    rest_N = 1 - relative_NK[:, [k for k in range(relative_NK.shape[1]) if k not in free]].sum(1)
    if not free or not np.isfinite(relative_NK).all():
        return theta_P
    scale_K = relative_NK[:, free].mean(0)
    weights, _ = nnls(relative_NK[:, free] / scale_K, rest_N, maxiter=1000)
    theta[[form.coefficients[k] for k in free]] = np.log(np.maximum(weights, 1e-3) / scale_K)
    return form.box.clip(theta[None])[0]


def _perturbed(theta_P: Array, count: int, size: float) -> Array:
    points = qmc.Sobol(len(theta_P), scramble=False).random_base2(int(np.ceil(np.log2(count + 1))))[1 : count + 1]
    return theta_P + size * (2 * points - 1)


def _zeros(
    form: Form,
    rows: Rows,
    problem: Callable[[Array, NDArray[np.intp]], Derivatives],
    best: Array,
    value: float,
    scale: float,
) -> tuple[Array, float]:
    """Coefficients that only creep towards 0 are set there, where the objective then is no higher."""
    for column in {k for k in form.coefficients if k >= 0}:
        if best[column] < np.log(rows.loss_N.min()) - _NEARLY_ZERO and best[column] > form.box.lower_P[column]:
            pinned = form.box.upper_P.copy()
            pinned[column] = form.box.lower_P[column]
            found = minimise(problem, best[None], Box(form.box.lower_P, pinned), scale)
            if found.value_S[0] <= value * (1 + 1e-12):
                best, value = found.theta_SP[0], float(found.value_S[0])
    return best, value


def _bootstrap(form: Form, rows: Rows, best: Array, weights: Array, options: FitOptions) -> Array:
    """(B, P): each draw fitted from the optimum and, where that is cheap, from a point near it.

    Coarser than the fit: what is left is next to nothing of the spread of the draws.
    """
    times = 2 if len(best) < _MANY_PARAMETERS else 1
    near = np.concatenate([best[None], _perturbed(best, times - 1, 0.1)]) if times > 1 else best[None]
    problem = _problem(form, rows, weights, options, times)
    found = minimise(
        problem,
        np.tile(near, (options.draws, 1)),
        form.box,
        1e-12 * options.delta**2,
        tolerance=_COARSE,
        max_steps=_FEW,
    )
    best_of = found.value_S.reshape(-1, times).argmin(1)
    draws: Array = found.theta_SP.reshape(options.draws, times, -1)[np.arange(options.draws), best_of]
    creeping = draws < np.log(rows.loss_N.min()) - _NEARLY_ZERO
    for column in {k for k in form.coefficients if k >= 0}:
        draws[creeping[:, column], column] = form.box.lower_P[column]
    return draws
