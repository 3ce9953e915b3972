"""A damped Newton method in a box, of many fits side by side.

L-BFGS stops far from the optimum of a sum of Huber terms: with delta 1e-3 most runs lie on the straight parts, and
curvature comes and goes as runs enter and leave them. Here each step solves (|H| + damping M) step = -gradient with the
exact hessian H and M the matrix of iteratively reweighted least squares, which never vanishes; once the set of runs
within delta no longer changes, convergence is quadratic.

Shapes: S fits side by side, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mepa_ds.scaling.laws.fitting.logsum import Derivatives

Array = NDArray[np.float64]
TOLERANCE = 1e-13
"""A fit has converged when a step promises to lower the objective by less than a hundredth of this share of it."""
_LONGEST = 2.0  # change of one parameter in a step: all are logarithms or exponents
_GIVEN_UP = 1e12


@dataclass(frozen=True)
class Box:
    """Bounds (P,) of the parameters. Equal ones fix a parameter."""

    lower_P: Array
    upper_P: Array

    def clip(self, theta_SP: Array) -> Array:
        return np.clip(theta_SP, self.lower_P, self.upper_P)


@dataclass(frozen=True)
class Minima:
    """(S, P) and (S,): where each fit ended, and the objective there."""

    theta_SP: Array
    value_S: Array


def minimise(
    evaluate: Callable[[Array, NDArray[np.intp]], Derivatives],
    theta_SP: Array,
    box: Box,
    scale: float,
    *,
    tolerance: float = TOLERANCE,
    max_steps: int = 1000,
) -> Minima:
    """Local minima of S problems.

    Args:
        evaluate: parameters (s, P) and the numbers (s,) of their problems to their derivatives.
        theta_SP: where each starts.
        scale: an objective so small that it is rounding.
    """
    theta = box.clip(theta_SP)
    everything = np.arange(len(theta))
    damping = np.full(len(theta), 0.1)
    with np.errstate(all="ignore"):
        at = evaluate(theta, everything)
        value, gradient, hessian, metric = at.value_S, at.gradient_SP, at.hessian_SPP, at.metric_SPP
        value = np.where(np.isfinite(value), value, np.inf)
        active = np.flatnonzero(np.isfinite(value) & np.isfinite(gradient).all(1) & np.isfinite(hessian).all((1, 2)))
        for _ in range(max_steps):
            if not len(active):
                break
            step, promised = _steps(
                theta[active], gradient[active], hessian[active], metric[active], damping[active], box
            )
            trial = box.clip(theta[active] + step)
            at = evaluate(trial, active)
            good = (at.value_S < value[active]) & np.isfinite(at.gradient_SP).all(1)
            gain = np.where(good, (value[active] - at.value_S) / np.maximum(promised, 1e-300), -1.0)
            kept = active[good]
            theta[kept], value[kept], gradient[kept] = trial[good], at.value_S[good], at.gradient_SP[good]
            hessian[kept], metric[kept] = at.hessian_SPP[good], at.metric_SPP[good]
            factor = np.select([gain < 0, gain < 0.25, gain < 0.75], [6.0, 2.0, 0.5], 0.08)
            damping[active] = np.maximum(damping[active] * factor, 1e-14)
            # A step that damping has shortened promises little anywhere.
            least = np.where(damping[active] <= 1, tolerance, min(tolerance, TOLERANCE)) / 100 * value[active] + scale
            done = (promised <= least) | (damping[active] > _GIVEN_UP)
            active = active[~done]
    return Minima(theta, value)


def _steps(
    theta: Array, gradient: Array, hessian: Array, metric: Array, damping: Array, box: Box
) -> tuple[Array, Array]:
    """Steps (s, P), and how much each promises to lower the objective (s,)."""
    P = theta.shape[1]
    held = (theta <= box.lower_P) & (gradient >= 0) | (theta >= box.upper_P) & (gradient <= 0)
    held |= box.lower_P == box.upper_P
    gradient = np.where(held, 0.0, gradient)
    either = held[:, :, None] | held[:, None, :]
    eye = np.eye(P)
    size = np.maximum(np.trace(metric, axis1=1, axis2=2), 1e-300)[:, None, None] / P
    # Held parameters are cut out: their rows and columns become those of the identity.
    hessian = np.where(either, size * eye, hessian)
    root = np.linalg.cholesky(np.where(either, size * eye, metric) + 1e-9 * size * eye)
    half = np.linalg.solve(root, hessian)
    values, vectors = np.linalg.eigh(np.linalg.solve(root, half.transpose(0, 2, 1)))
    turned = np.linalg.solve(root, gradient[..., None])
    inside = vectors.transpose(0, 2, 1) @ turned / (np.abs(values) + damping[:, None])[..., None]
    step = -np.linalg.solve(root.transpose(0, 2, 1), vectors @ inside)[..., 0]
    step *= np.minimum(1.0, _LONGEST / np.maximum(np.abs(step).max(1), 1e-300))[:, None]
    # The quadratic model's promise, halved at worst by the step's shortening.
    promised = -(step * gradient).sum(1) / 2
    return np.where(np.isfinite(step), step, 0.0), np.where(np.isfinite(promised), promised, 0.0)
