"""Minima of loss curves: of a parabola in the logarithm of the input, and of Akima's spline; and lines through them.

Shapes: M points of one curve, B bootstrap draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import Akima1DInterpolator

from mepa_ds.scaling.laws.fitting.checks import SAME_SIZE, size_groups

Array = NDArray[np.float64]
MIN_PARABOLA, MIN_AKIMA = 3, 4
"""Different inputs that a curve needs."""


@dataclass(frozen=True)
class Minimum:
    """The least loss of one curve.

    Attributes:
        at: what the curve belongs to: a FLOP budget, or a size.
        place: the input of least loss; NaN where there is none.
        loss: that loss.
        why: why the minimum was left out; empty where it was used.
        low: the least input sampled.
        high: the greatest input sampled.
    """

    at: tuple[float, ...]
    place: float
    loss: float
    why: str
    low: float
    high: float


def merged(x_M: Array, loss_M: Array) -> tuple[Array, Array]:
    """Inputs that are one (seeds), as the mean of their logarithms, with the mean of their losses; ascending."""
    groups = size_groups(x_M)
    count = np.bincount(groups)
    return np.exp(np.bincount(groups, np.log(x_M)) / count), np.bincount(groups, loss_M) / count


def parabola(x_M: Array, loss_M: Array) -> tuple[float, float, str]:
    """Minimum of the least-squares parabola of loss in log x: (x, loss, why it is not to be used)."""
    log_x = np.log(x_M)
    centre, width = log_x.mean(), np.ptp(log_x)
    found = _why_not(x_M, loss_M, MIN_PARABOLA)
    if found:
        return np.nan, np.nan, found
    curve, slope, level = np.polyfit((log_x - centre) / width, loss_M, 2)
    if curve <= 0:
        return np.nan, np.nan, "the parabola has no minimum"
    place = -slope / (2 * curve)
    log_place = centre + place * width
    if not log_x.min() < log_place < log_x.max():
        return float(np.exp(log_place)), np.nan, "the minimum is at the edge of what was sampled"
    return float(np.exp(log_place)), float(level - slope**2 / (4 * curve)), ""


def akima(x_M: Array, loss_M: Array) -> tuple[float, float, str]:
    """Minimum of Akima's spline of loss in log x, through the means of equal inputs."""
    found = _why_not(x_M, loss_M, MIN_AKIMA)
    if found:
        return np.nan, np.nan, found
    knots, losses = merged(x_M, loss_M)
    spline = Akima1DInterpolator(np.log(knots), losses)
    roots = spline.derivative().roots(extrapolate=False)
    roots = roots[np.isfinite(roots)]
    values = spline(roots)
    if not len(roots) or values.min() > losses.min() + 1e-12:
        return np.nan, np.nan, "the minimum is at the edge of what was sampled"
    return float(np.exp(roots[values.argmin()])), float(values.min()), ""


def _why_not(x_M: Array, loss_M: Array, needed: int) -> str:
    knots, losses = merged(x_M, loss_M)
    if len(knots) < needed:
        return f"{len(knots)} different inputs, {needed} are needed"
    if losses.argmin() in (0, len(losses) - 1):
        return "the minimum is at the edge of what was sampled"
    return ""


def parabola_residuals(x_M: Array, loss_M: Array) -> tuple[Array, Array]:
    """Values of the parabola, and the losses' distances from it, widened by what three parameters have taken away."""
    log_x = np.log(x_M)
    scaled = (log_x - log_x.mean()) / max(np.ptp(log_x), SAME_SIZE)
    values = np.polyval(np.polyfit(scaled, loss_M, 2), scaled)
    widen = np.sqrt(len(x_M) / max(len(x_M) - 3, 1))
    return values, (loss_M - values) * widen


def line(design_MP: Array, target_M: Array) -> Array:
    """Least squares, (P,)."""
    return np.linalg.lstsq(design_MP, target_M, rcond=None)[0].astype(np.float64)


def drawn_minima(curves: list[tuple[Array, Array]], method: str, draws: int, seed: int) -> Array:
    """Logarithms of the minima (B, curves) of curves drawn anew; NaN where a drawn curve has none.

    Each is the parabola of its curve plus residuals of all curves, relative to their losses, drawn with replacement.
    """
    rng = np.random.default_rng(seed)
    smooth = [parabola_residuals(x, loss) for x, loss in curves]
    pool = np.concatenate([rest / values for values, rest in smooth])
    find = _parabolas if method == "parabola" else _akimas
    return np.stack(
        [
            find(x, values * (1 + rng.choice(pool, size=(draws, len(x)))))
            for (x, _), (values, _) in zip(curves, smooth, strict=True)
        ],
        1,
    )


def _parabolas(x_M: Array, losses_BM: Array) -> Array:
    """Logarithms (B,) of the minima of many curves at the same inputs."""
    log_x = np.log(x_M)
    centre, width = log_x.mean(), np.ptp(log_x)
    scaled = (log_x - centre) / width
    _, slope, curve = np.linalg.pinv(np.vander(scaled, 3, increasing=True)) @ losses_BM.T
    place = -slope / np.where(curve > 0, 2 * curve, np.nan)
    inside = (place > scaled.min()) & (place < scaled.max())
    return np.where(inside, centre + place * width, np.nan).astype(np.float64)


def _akimas(x_M: Array, losses_BM: Array) -> Array:
    places = (akima(x_M, losses_M) for losses_M in losses_BM)
    return np.array([np.log(place) if not why else np.nan for place, _, why in places])


def drawn_lines(design_MP: Array, minima_BM: Array) -> Array:
    """The line of each draw (B, P), through the minima it has; NaN where they are too few."""
    good = np.isfinite(minima_BM)
    result = np.full((len(minima_BM), design_MP.shape[1]), np.nan)
    for row, (values, use) in enumerate(zip(minima_BM, good, strict=True)):
        if np.linalg.matrix_rank(design_MP[use]) == design_MP.shape[1]:
            result[row] = line(design_MP[use], values[use])
    return result
