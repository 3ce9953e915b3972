"""The terms of the objective, of log predictions f: their values, first and second derivatives in f.

Shapes: S fits side by side (starts or bootstrap draws), N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mepa_ds.scaling.laws.fitting.options import FitOptions

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Terms:
    """Each (S, N). `majorant` is a curvature that bounds the term from above where its own one is 0."""

    value: Array
    slope: Array
    curvature: Array
    majorant: Array


def terms(f_SN: Array, log_loss_N: Array, options: FitOptions) -> Terms:
    """The terms of the objective that `options` names, before they are weighted and summed over rows."""
    residual_SN = f_SN - log_loss_N
    if options.objective == "log_ls":
        ones = np.ones_like(residual_SN)
        return Terms(residual_SN**2 / 2, residual_SN, ones, ones)
    if options.objective == "raw_ls":
        predicted_SN = np.exp(f_SN)
        # (exp(r) - 1) times the loss: exact where the prediction is close.
        error_SN = np.expm1(residual_SN) * np.exp(log_loss_N)
        squares = predicted_SN**2
        return Terms(error_SN**2 / 2, error_SN * predicted_SN, squares + error_SN * predicted_SN, squares)
    delta = options.delta
    size_SN = np.abs(residual_SN)
    inside = size_SN <= delta
    value = np.where(inside, residual_SN**2 / 2, delta * (size_SN - delta / 2))
    slope = np.clip(residual_SN, -delta, delta)
    majorant = np.where(inside, 1.0, delta / np.maximum(size_SN, delta))
    if options.objective == "huber":
        return Terms(value, slope, inside.astype(np.float64), majorant)
    weight = np.where(residual_SN < 0, options.asymmetry, 1.0)
    return Terms(weight * value, weight * slope, weight * inside, weight * majorant)
