"""Laws as logarithms of sums of exponentials, with exact derivatives, and the objective of many fits at once.

Hoffmann's form of a law is f = log sum_k exp(u_k): of E + A N^-alpha + B D^-beta the terms are u = (e, a - alpha log N,
b - beta log D), linear in the parameters. A law whose inputs are bent by parameters of their own (effective data,
effective experts) has terms u_k = P_k theta + (Q_k theta) z_k(theta).

Shapes: S fits side by side, N rows, K terms, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mepa_ds.scaling.laws.fitting.objective import terms
from mepa_ds.scaling.laws.fitting.options import FitOptions

Array = NDArray[np.float64]
_CHUNK = 1_500_000  # numbers in the largest array of a chunk: stays in the cache


@dataclass(frozen=True)
class Bent:
    """Inputs z_SNK of the terms, their gradients (S, N, K, P), and `bend`: weights (S, N, K) to sum of w * hessians."""

    z_SNK: Array
    slope_SNKP: Array
    bend: Callable[[Array], Array]


class Warp(Protocol):
    """How parameters bend the inputs of the terms."""

    factors_NKP: Array
    """Q: which parameters multiply the bent inputs."""

    def __call__(self, theta_SP: Array) -> Bent: ...


@dataclass(frozen=True)
class Derivatives:
    """Of the objective of S fits. `metric` is a positive semidefinite stand-in for the hessian."""

    value_S: Array
    gradient_SP: Array
    hessian_SPP: Array
    metric_SPP: Array


class LogSum:
    """log of a sum of exponentials, on the rows of one table.

    Args:
        design_NKP: P of each term.
        warp: the bent inputs, for laws that have some.
    """

    def __init__(self, design_NKP: Array, warp: Warp | None = None):
        self.design_NKP = design_NKP
        self.warp = warp
        self.num_rows, self.num_terms, self.num_parameters = design_NKP.shape
        self._flat = design_NKP.reshape(-1, self.num_parameters)
        self._outer = (self._flat[:, :, None] * self._flat[:, None, :]).reshape(len(self._flat), -1)

    def term_values(self, theta_SP: Array) -> Array:
        """u, (S, N, K)."""
        u = (theta_SP @ self._flat.T).reshape(-1, self.num_rows, self.num_terms)
        if self.warp is not None:
            u = u + np.einsum("nkp,sp->snk", self.warp.factors_NKP, theta_SP) * self.warp(theta_SP).z_SNK
        return u

    def log_loss(self, theta_SP: Array) -> Array:
        """f, (S, N): the logarithm of the predicted loss."""
        return _logsumexp(self.term_values(theta_SP))

    def derivatives(self, theta_SP: Array, log_loss_N: Array, weights_SN: Array, options: FitOptions) -> Derivatives:
        """Value, gradient and hessian of sum_n weight_n term(f_n, log_loss_n)."""
        size = self.num_rows * self.num_parameters * (self.num_terms if self.warp is not None else 1)
        step = max(1, _CHUNK // size)
        parts = [
            self._derivatives(theta_SP[i : i + step], log_loss_N, weights_SN[i : i + step], options)
            for i in range(0, len(theta_SP), step)
        ]
        return Derivatives(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("value_S", "gradient_SP", "hessian_SPP", "metric_SPP")
            )
        )

    def _derivatives(self, theta_SP: Array, log_loss_N: Array, weights_SN: Array, options: FitOptions) -> Derivatives:
        S, P = theta_SP.shape
        u_SNK = (theta_SP @ self._flat.T).reshape(S, self.num_rows, self.num_terms)
        if self.warp is None:
            slopes, second = self.design_NKP[None], None
        else:
            bent, factors = self.warp(theta_SP), self.warp.factors_NKP
            factor_SNK = np.einsum("nkp,sp->snk", factors, theta_SP)
            u_SNK = u_SNK + factor_SNK * bent.z_SNK
            slopes = self.design_NKP + factors * bent.z_SNK[..., None] + factor_SNK[..., None] * bent.slope_SNKP
            second = bent
        f_SN = _logsumexp(u_SNK)
        share_SNK = np.exp(u_SNK - f_SN[..., None])
        jacobian_SNP = sum(share_SNK[:, :, k, None] * slopes[:, :, k] for k in range(self.num_terms))
        at = terms(f_SN, log_loss_N, options)
        pull_SN = weights_SN * at.slope
        pull_SNK = pull_SN[..., None] * share_SNK
        hessian = _gram(jacobian_SNP, weights_SN * at.curvature - pull_SN)
        if second is None:
            hessian = hessian + (pull_SNK.reshape(S, -1) @ self._outer).reshape(S, P, P)
        else:
            flat = slopes.reshape(S, -1, P)
            hessian = hessian + _gram(flat, pull_SNK.reshape(S, -1)) + second.bend(pull_SNK * factor_SNK)
            crossed = np.einsum("snk,nkp,snkq->spq", pull_SNK, factors, bent.slope_SNKP, optimize=True)
            hessian = hessian + crossed + crossed.transpose(0, 2, 1)
        return Derivatives(
            (weights_SN * at.value).sum(1),
            (pull_SN[:, None, :] @ jacobian_SNP)[:, 0],
            hessian,
            _gram(jacobian_SNP, weights_SN * at.majorant),
        )


def _logsumexp(u_SNK: Array) -> Array:
    top = u_SNK.max(-1)
    result: Array = top + np.log(np.exp(u_SNK - top[..., None]).sum(-1))
    return result


def _gram(jacobian_SNP: Array, weights_SN: Array) -> Array:
    return (jacobian_SNP * weights_SN[..., None]).transpose(0, 2, 1) @ jacobian_SNP
