"""The formulas of ADM's evaluation suite, in float64: Frechet distance, inception score, precision and recall.

Shapes: N images, M others, D features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mepa_ds.errors import UserError

SPLIT = 5000
"""Images in a split of the inception score."""
NEIGHBOURS = 3
_ROWS = 1000  # in float64 at a time: 0.4 GB of distances to 50 000 images
# Squared distances below this share of the squared norms are rounding: the points are equal.
_SAME = 1e-12
# Share of the trace below which a negative eigenvalue of a covariance stored in fp32 is rounding.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def of(cls, features_ND: Tensor) -> Gaussian:
        """Mean and covariance of at least two images. The covariance is divided by N - 1, as NumPy's.

        Raises:
            UserError: one image alone has no covariance.
        """
        if len(features_ND) < 2:
            raise UserError(f"statistics of {len(features_ND)} images: at least 2 are needed for a covariance")
        mean_D = features_ND.mean(0, dtype=torch.float64)
        scatter_DD = torch.zeros(len(mean_D), len(mean_D), dtype=torch.float64)
        for part_ND in features_ND.split(_ROWS):
            centred_ND = part_ND.double() - mean_D
            scatter_DD.addmm_(centred_ND.T, centred_ND)
        return cls(mean_D.numpy(), (scatter_DD / (len(features_ND) - 1)).numpy())


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    C1 C2 has the eigenvalues of R C2 R with R R = C1. That matrix is symmetric, so no complex numbers occur, and
    singular covariances (of fewer images than features) are no special case.

    Raises:
        UserError: a matrix has negative eigenvalues, so it is no covariance.
    """
    values_D, vectors_DD = np.linalg.eigh(first.covariance)
    _check_eigenvalues(values_D)
    root_DD = (vectors_DD * np.sqrt(values_D.clip(0))) @ vectors_DD.T
    product_D = np.linalg.eigvalsh(root_DD @ second.covariance @ root_DD)
    difference_D = first.mean - second.mean
    traces = float(np.trace(first.covariance) + np.trace(second.covariance))
    return float(difference_D @ difference_D) + traces - 2 * float(np.sqrt(product_D.clip(0)).sum())


def is_covariance(matrix_DD: NDArray[np.float64]) -> bool:
    """Whether the matrix is symmetric and has no negative eigenvalues, to the rounding of fp32."""
    tolerance = _ROUNDING * float(np.trace(matrix_DD))
    if tolerance < 0 or np.abs(matrix_DD - matrix_DD.T).max() > tolerance:
        return False
    try:
        # A tenth of the time that eigenvalues take.
        np.linalg.cholesky(matrix_DD + max(tolerance, np.finfo(np.float64).tiny) * np.eye(len(matrix_DD)))
    except np.linalg.LinAlgError:
        return False
    return True


def _check_eigenvalues(values_D: NDArray[np.float64]) -> None:
    if values_D[0] < -_ROUNDING * max(values_D.sum(), 0.0):
        raise UserError(f"a covariance has the negative eigenvalue {values_D[0]:g}: the statistics are damaged")


def inception_scores(logits_NK: Tensor) -> list[float]:
    """For each split: exp of the mean KL divergence of its images' predictions from their mean.

    Splits are 5000 images, 5000 images, ... and the rest, as ADM's suite cuts them.
    """
    scores = []
    for part_NK in logits_NK.split(SPLIT):
        log_p_NK = part_NK.double().log_softmax(dim=1)
        p_NK = log_p_NK.exp()
        # A class whose probability underflows to 0 in all images adds 0, and not 0 times infinity.
        log_mean_K = p_NK.mean(0).clamp_min(torch.finfo(torch.float64).tiny).log()
        scores.append(float((p_NK * (log_p_NK - log_mean_K)).sum(1).mean().exp()))
    return scores


def precision_and_recall(
    samples_ND: Tensor, real_MD: Tensor, device: torch.device | None = None
) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991).

    Precision is the share of samples that lie in the ball of a real image. A ball's radius is the distance from its
    image to the third neighbour among the real images. Recall is the same with both sets exchanged.

    Args:
        device: where the distances are computed; None: where the features are.

    Raises:
        UserError: a set has too few images for third neighbours.
    """
    for what, features in (("samples", samples_ND), ("real images", real_MD)):
        if len(features) <= NEIGHBOURS:
            raise UserError(
                f"precision and recall: {len(features)} {what}, but neighbours are looked for among at least "
                f"{NEIGHBOURS + 1}"
            )
    samples_ND, real_MD = (features.to(device, torch.float64) for features in (samples_ND, real_MD))
    return _covered(samples_ND, real_MD), _covered(real_MD, samples_ND)


def _covered(points_ND: Tensor, centres_MD: Tensor) -> float:
    """The share of points that lie in the ball of some centre."""
    # The nearest one is the centre itself.
    radii_M = torch.cat(
        [
            _squared_distances(part_MD, centres_MD).topk(NEIGHBOURS + 1, largest=False).values[:, -1]
            for part_MD in centres_MD.split(_ROWS)
        ]
    )
    inside = sum(
        int((_squared_distances(part_ND, centres_MD) <= radii_M).any(1).sum()) for part_ND in points_ND.split(_ROWS)
    )
    return inside / len(points_ND)


def _squared_distances(first_ND: Tensor, second_MD: Tensor) -> Tensor:
    """(N, M), exactly 0 between equal points: where many images are equal, the radius is 0 too."""
    norms_NM = first_ND.square().sum(1)[:, None] + second_MD.square().sum(1)
    distances_NM = torch.addmm(norms_NM, first_ND, second_MD.T, alpha=-2)
    return distances_NM.masked_fill_(distances_NM <= _SAME * norms_NM, 0)
