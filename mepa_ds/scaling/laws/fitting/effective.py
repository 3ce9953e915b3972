"""Inputs that a law's own parameters bend, with exact derivatives: effective data and size, effective experts.

Shapes: S fits side by side, N rows, K terms, P parameters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mepa_ds.scaling.laws.fitting.logsum import Bent

Array = NDArray[np.float64]
_FURTHEST = 60.0  # log of how far a size may lie beyond the best one before its repeats are counted as infinite


class EffectiveInputs:
    """log N' and log D' of repeated data (arXiv 2305.16264), of parameters e, a, b, alpha, beta, log R*_N, log R*_D.

    Args:
        x_N: centred log N.
        y_N: centred log D.
        unique_N: log of the unique tokens, centred as y_N, nowhere above it.
        spread_7P: the seven parameters from the P that are fitted.
    """

    def __init__(self, x_N: Array, y_N: Array, unique_N: Array, spread_7P: Array):
        self.x_N, self.unique_N, self.spread_7P = x_N, unique_N, spread_7P
        self.repeats_N = np.expm1(y_N - unique_N)
        factors = np.zeros((len(x_N), 3, 7))
        factors[:, 1, 3], factors[:, 2, 4] = -1, -1
        self.factors_NKP = factors @ spread_7P

    def __call__(self, theta_SP: Array) -> Bent:
        full = theta_SP @ self.spread_7P.T
        S, N = len(full), len(self.x_N)
        z, slope = np.zeros((S, N, 3)), np.zeros((S, N, 3, 7))
        best, best_slope, best_bend = _best_size(full, self.unique_N)
        size = _EffectiveSize(self.x_N, best, full[:, 5, None])
        z[:, :, 1] = size.value
        slope[:, :, 1] = size.by_best[..., None] * best_slope
        slope[:, :, 1, 5] = size.by_star
        gain, by_star, by_star_twice = _gain_by_star(self.repeats_N, full[:, 6, None])
        z[:, :, 2], slope[:, :, 2, 6] = self.unique_N + gain, by_star

        def bend(weights_SNK: Array) -> Array:
            w = weights_SNK[:, :, 1]
            total = (best_slope * (w * size.by_best_twice)[..., None]).transpose(0, 2, 1) @ best_slope
            total += np.einsum("sn,snpq->spq", w * size.by_best, best_bend)
            cross = np.einsum("sn,snp->sp", w * size.by_both, best_slope)
            total[:, :, 5] += cross
            total[:, 5, :] += cross
            total[:, 5, 5] += (w * size.by_star_twice).sum(1)
            total[:, 6, 6] += (weights_SNK[:, :, 2] * by_star_twice).sum(1)
            bent: Array = self.spread_7P.T @ total @ self.spread_7P
            return bent

        return Bent(z, slope @ self.spread_7P, bend)


def _best_size(full_S7: Array, unique_N: Array) -> tuple[Array, Array, Array]:
    """log N of the best size for the unique tokens, v = (log(alpha / beta) + a - b + beta * unique) / alpha.

    From alpha A N^-alpha = beta B D^-beta. Returns v (S, N), its gradient (S, N, 7) and hessian (S, N, 7, 7).
    """
    a, b, alpha, beta = (full_S7[:, i, None] for i in (1, 2, 3, 4))
    top = np.log(alpha / beta) + a - b + beta * unique_N
    slope, bend = np.zeros((*top.shape, 7)), np.zeros((*top.shape, 7, 7))
    slope[..., 1], slope[..., 2] = 1 / alpha, -1 / alpha
    slope[..., 3], slope[..., 4] = (1 - top) / alpha**2, (unique_N - 1 / beta) / alpha
    bend[..., 1, 3] = bend[..., 3, 1] = -1 / alpha**2
    bend[..., 2, 3] = bend[..., 3, 2] = 1 / alpha**2
    bend[..., 3, 3] = (2 * top - 3) / alpha**3
    bend[..., 3, 4] = bend[..., 4, 3] = -(unique_N - 1 / beta) / alpha**2
    bend[..., 4, 4] = 1 / (beta**2 * alpha)
    return top / alpha, slope, bend


def _gain_by_star(repeats: Array, log_star: Array) -> tuple[Array, Array, Array]:
    """g = log(1 + r (1 - exp(-R / r))) with r = exp(log_star), and its first two derivatives in log_star."""
    star = np.exp(log_star)
    ratio = repeats / star
    rest = np.exp(-ratio)
    total = -star * np.expm1(-ratio)
    first = total - repeats * rest
    by_star = first / (1 + total)
    return np.log1p(total), by_star, (first - repeats * ratio * rest) / (1 + total) - by_star**2


class _EffectiveSize:
    """h = log N' = v + g(N / U - 1), and its derivatives in v = log U ("best") and log R*_N ("star"); x where x <= v.

    First derivatives are continuous where x = v.
    """

    def __init__(self, x_N: Array, best_SN: Array, log_star: Array):
        beyond = x_N > best_SN
        ratio_U = np.exp(np.clip(x_N - best_SN, 0.0, _FURTHEST))  # N / U
        repeats, star = ratio_U - 1, np.exp(log_star)
        gain, by_star, by_star_twice = _gain_by_star(repeats, log_star)
        q = repeats / star
        rest, total = np.exp(-q), -star * np.expm1(-q)
        by_repeats = rest / (1 + total)
        by_repeats_twice = -rest / star / (1 + total) - by_repeats**2
        crossed = (q * rest - by_repeats * (total - repeats * rest)) / (1 + total)
        self.value = np.where(beyond, best_SN + gain, x_N)
        self.by_best = np.where(beyond, 1 - ratio_U * by_repeats, 0.0)
        self.by_star = np.where(beyond, by_star, 0.0)
        self.by_best_twice = np.where(beyond, ratio_U * by_repeats + ratio_U**2 * by_repeats_twice, 0.0)
        self.by_both = np.where(beyond, -ratio_U * crossed, 0.0)
        self.by_star_twice = np.where(beyond, by_star_twice, 0.0)


class EffectiveExperts:
    """z = log Ê - centre, 1 / Ê = 1 / (E - 1 + kappa) + 1 / Em, of the last two parameters, log kappa and log Em.

    kappa = 1 / (1 / Es - 1 / Em) (arXiv 2202.01169, equation 4).

    Args:
        experts_N: E.
        centre: taken off log Ê.
        factors_NKP: Q.
    """

    def __init__(self, experts_N: Array, centre: float, factors_NKP: Array):
        self.experts_N, self.centre, self.factors_NKP = experts_N, centre, factors_NKP

    def __call__(self, theta_SP: Array) -> Bent:
        S, P = theta_SP.shape
        N, K, _ = self.factors_NKP.shape
        kappa, log_most = np.exp(theta_SP[:, -2, None]), theta_SP[:, -1, None]
        sum_SN = self.experts_N - 1 + kappa
        log_sum = np.log(sum_SN)
        z = -np.logaddexp(-log_sum, -log_most)
        share = np.exp(z - log_sum)  # dz / dlog_sum; the rest is dz / dlog_most
        part = kappa / sum_SN  # dlog_sum / dlog_kappa
        slope = np.zeros((S, N, 1, P))
        slope[:, :, 0, -2], slope[:, :, 0, -1] = share * part, 1 - share
        curve = share * (1 - share)

        def bend(weights_SNK: Array) -> Array:
            w = weights_SNK.sum(-1)
            total = np.zeros((S, P, P))
            total[:, -2, -2] = (w * (share * part * (1 - part) - curve * part**2)).sum(1)
            total[:, -1, -1] = -(w * curve).sum(1)
            total[:, -2, -1] = total[:, -1, -2] = (w * curve * part).sum(1)
            return total

        shape = (S, N, K)
        return Bent(np.broadcast_to((z - self.centre)[..., None], shape), np.broadcast_to(slope, (*shape, P)), bend)
