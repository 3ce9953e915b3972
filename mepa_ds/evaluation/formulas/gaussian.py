"""The Frechet distance of two Gaussians, in float64.

Shapes: N images, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.evaluation.formulas.checks import Array, as_numbers, as_rows

_ROWS = 2000  # in float64 at a time
# Share of the trace below which a negative eigenvalue, or an asymmetry, of a covariance stored in fp32 is rounding.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def of(cls, features: Array) -> Gaussian:
        """Mean and covariance of at least two images. The covariance is divided by N - 1, as NumPy's.

        Raises:
            UserError: one image alone has no covariance; or the features are no finite numbers.
        """
        features_ND = as_rows(features, "statistics", least=2)
        mean_D = features_ND.mean(0, dtype=torch.float64)
        scatter_DD = torch.zeros(len(mean_D), len(mean_D), dtype=torch.float64, device=mean_D.device)
        for part_ND in features_ND.split(_ROWS):
            centred_ND = part_ND.double() - mean_D
            scatter_DD.addmm_(centred_ND.T, centred_ND)
        return cls(mean_D.cpu().numpy(), (scatter_DD / (len(features_ND) - 1)).cpu().numpy())


def frechet_distance(
    mu1: Array, sigma1: Array, mu2: Array, sigma2: Array, device: torch.device | str | None = None
) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Dowson and Landau, 1982; FID, arXiv 1706.08500).

    sigma1 sigma2 has the eigenvalues of R sigma2 R with R R = sigma1. That matrix is symmetric, so no complex numbers
    occur, and singular covariances (of fewer images than features) are no special case: what is below float64's
    rounding of the largest eigenvalue counts as zero.

    Args:
        mu1: means (D,).
        sigma1: covariances (D, D), symmetric and without negative eigenvalues to the rounding of fp32.
        device: where the eigenvalues are computed; None: on the CPU.

    Raises:
        UserError: shapes that do not fit, numbers that are not finite, or a matrix that is no covariance.
    """
    means, covariances = [], []
    for number, mu, sigma in ((1, mu1, sigma1), (2, mu2, sigma2)):
        mean_D, covariance_DD = as_numbers(mu, f"mu{number}"), as_numbers(sigma, f"sigma{number}")
        size = mean_D.numel()
        if mean_D.ndim != 1 or covariance_DD.shape != (size, size) or not size:
            raise UserError(
                f"mu{number} and sigma{number}: of shapes {tuple(mean_D.shape)} and {tuple(covariance_DD.shape)}, "
                "expected (D,) and (D, D)"
            )
        means.append(mean_D.to(device or "cpu", torch.float64))
        covariances.append(covariance_DD.to(device or "cpu", torch.float64))
    if len(means[0]) != len(means[1]):
        raise UserError(f"the statistics are of {len(means[0])} and {len(means[1])} features: of two feature spaces")
    for number, mean_D, covariance_DD in zip((1, 2), means, covariances, strict=True):
        fault = covariance_fault(covariance_DD)
        if fault is None and not mean_D.isfinite().all():
            fault = "has a mean that is not finite"
        if fault is not None:
            raise UserError(f"sigma{number} {fault}: the statistics are damaged")
    difference_D = means[0] - means[1]
    traces = float(covariances[0].trace() + covariances[1].trace())
    cross = float(_trace_of_root(root_of(covariances[0], "sigma1"), covariances[1]))
    return float(difference_D @ difference_D) + traces - 2 * cross


def root_of(covariance_DD: Tensor, what: str) -> Tensor:
    """R (D, D) with R R the covariance. Raises UserError for a negative eigenvalue beyond rounding."""
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    if values_D[0] < -_ROUNDING * max(float(values_D.sum()), 0.0):
        raise UserError(f"{what} has the negative eigenvalue {float(values_D[0]):g}: it is no covariance")
    return (vectors_DD * without_rounding(values_D).sqrt()) @ vectors_DD.T


def _trace_of_root(root_DD: Tensor, other_DD: Tensor) -> Tensor:
    product_DD = root_DD @ other_DD @ root_DD
    return without_rounding(torch.linalg.eigvalsh((product_DD + product_DD.T) / 2)).sqrt().sum()


def without_rounding(values_D: Tensor) -> Tensor:
    """Eigenvalues, zero where rounding alone may have made them: its root would be a thousand times larger."""
    noise = len(values_D) * torch.finfo(values_D.dtype).eps * values_D.abs().max()
    return torch.where(values_D > noise, values_D, 0)


def covariance_fault(matrix_DD: Tensor | NDArray[np.float64]) -> str | None:
    """Why a matrix (float64) cannot be a covariance, to the rounding of fp32; None if it can be one."""
    matrix_DD = torch.as_tensor(matrix_DD)
    if not matrix_DD.isfinite().all():
        return "has values that are not finite"
    tolerance = _ROUNDING * float(matrix_DD.trace())
    if tolerance < 0 or float((matrix_DD - matrix_DD.T).abs().max()) > tolerance:
        return "is no covariance (it is not symmetric, or has negative eigenvalues)"
    # A tenth of the time that eigenvalues take.
    shifted_DD = matrix_DD.clone()
    shifted_DD.diagonal().add_(max(tolerance, float(np.finfo(np.float64).tiny)))
    if int(torch.linalg.cholesky_ex(shifted_DD).info):
        return "is no covariance (it is not symmetric, or has negative eigenvalues)"
    return None


class RunningGaussian:
    """Mean and covariance of features that come in batches, of which none is kept."""

    def __init__(self, width: int):
        self._count = 0
        self._mean_D = torch.zeros(width, dtype=torch.float64)
        self._scatter_DD = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features_BD: Tensor) -> None:
        """Raises UserError for features that are not finite."""
        rows_BD = as_rows(features_BD, "statistics").double()
        mean_D = rows_BD.mean(0)
        centred_BD = rows_BD - mean_D
        self._scatter_DD.addmm_(centred_BD.T, centred_BD)
        # What the two means differ by (Chan, Golub and LeVeque, 1979).
        shift_D, total = mean_D - self._mean_D, self._count + len(rows_BD)
        self._scatter_DD.addr_(shift_D, shift_D, alpha=self._count * len(rows_BD) / total)
        self._mean_D += shift_D * (len(rows_BD) / total)
        self._count = total

    def gaussian(self) -> Gaussian:
        """Raises UserError for fewer than 2 images."""
        if self._count < 2:
            raise UserError(f"statistics of {self._count} images: at least 2 are needed for a covariance")
        return Gaussian(self._mean_D.numpy(), (self._scatter_DD / (self._count - 1)).numpy())


class FrechetTo:
    """Distances of many sets of samples to one reference: what is of the reference alone is computed once.

    The reference is as `Gaussian.of` makes one: what comes from a file is checked where the file is read.
    """

    def __init__(self, reference: Gaussian, device: torch.device | str | None = None):
        self.reference = reference
        self._mean_D = torch.from_numpy(reference.mean).to(device or "cpu")
        self._covariance_DD = torch.from_numpy(reference.covariance).to(self._mean_D.device)
        self._root_DD: Tensor | None = None

    def distance(self, samples: Array) -> tuple[float, float]:
        """The distance of samples (N, D), and its standard error over samples (the reference is taken as exact).

        The error is the infinitesimal jackknife's: the limit that the bootstrap over images tends to, without its
        resamples. With c an image's features less their mean, T = R2 (R2 C1 R2)^(-1/2) R2 the optimal transport and m
        the difference of the means, an image's influence is 2 c m + c (1 - T) c, less its mean.

        Raises:
            UserError: fewer than 2 samples, another width, numbers that are not finite.
        """
        samples_ND = as_rows(samples, "samples", least=2).to(self._mean_D.device)
        if samples_ND.shape[1] != len(self._mean_D):
            raise UserError(
                f"samples of {samples_ND.shape[1]} features, but the reference has {len(self._mean_D)}: both must come "
                "from the same feature space"
            )
        N = len(samples_ND)
        mean_D = samples_ND.mean(0, dtype=torch.float64)
        difference_D = mean_D - self._mean_D
        centred_ND = samples_ND.double() - mean_D
        squares_N, toward_N = centred_ND.square().sum(1), centred_ND @ difference_D
        roots, transported_N = self._transport(centred_ND)
        distance = float(difference_D @ difference_D + self._covariance_DD.trace())
        distance += float(squares_N.sum() / (N - 1)) - 2 * roots / (N - 1) ** 0.5
        influence_N = 2 * toward_N + squares_N - transported_N * (N - 1) ** 0.5
        return distance, float((influence_N - influence_N.mean()).square().sum().sqrt()) / N

    def _transport(self, centred_ND: Tensor) -> tuple[float, Tensor]:
        """Of B = A R2, A the centred samples: tr (B B^T)^(1/2), and the diagonal of (B B^T)^(1/2).

        By the smaller of B B^T, for which the root is not needed, and B^T B.
        """
        if centred_ND.shape[0] <= centred_ND.shape[1]:
            values_N, vectors_NN = torch.linalg.eigh(centred_ND @ self._covariance_DD @ centred_ND.T)
            roots_N = without_rounding(values_N).sqrt()
            return float(roots_N.sum()), (vectors_NN.square() * roots_N).sum(1)
        if self._root_DD is None:
            self._root_DD = root_of(self._covariance_DD, "sigma of the reference")
        moved_ND = centred_ND @ self._root_DD
        values_D, vectors_DD = torch.linalg.eigh(moved_ND.T @ moved_ND)
        roots_D = without_rounding(values_D).sqrt()
        inverse_D = torch.where(roots_D > 0, 1 / roots_D, 0)
        return float(roots_D.sum()), ((moved_ND @ vectors_DD).square() * inverse_D).sum(1)
