"""Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797): scores by neighbours.

Shapes: N reference images, M samples, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mepa_ds.evaluation.formulas.checks import Array, as_pair
from mepa_ds.evaluation.formulas.neighbours import Points, balls_around, neighbour_distances, prepare

PRECISION_K, DENSITY_K = 3, 5


@dataclass(frozen=True)
class Manifold:
    """What the images say one by one; the scores are the means, so their intervals come from the same numbers."""

    precision_M: Tensor
    """1 for a sample that lies in the ball of a reference image."""
    recall_N: Tensor
    """1 for a reference image that lies in the ball of a sample."""
    density_M: Tensor
    """In how many balls of reference images a sample lies, over k."""
    coverage_N: Tensor
    """1 for a reference image with a sample in its ball."""


def precision_recall(
    reference: Array, samples: Array, k: int = PRECISION_K, device: torch.device | str | None = None
) -> tuple[float, float]:
    """Precision is the share of samples that lie in the ball of a reference image. A ball's radius is the distance
    from its image to the k-th neighbour in its own set. Recall is the same with both sets exchanged.

    Exactly what a double loop in float64 gives; points on a ball's surface lie in it.

    Args:
        reference: (N, D) real images. samples: (M, D). Both need more than k rows.
        device: where distances are computed; None: where the samples are.

    Raises:
        UserError: too few rows, other widths, numbers that are not finite.
    """
    found = manifold(reference, samples, k, k, device)
    return float(found.precision_M.mean()), float(found.recall_N.mean())


def density_coverage(
    reference: Array, samples: Array, k: int = DENSITY_K, device: torch.device | str | None = None
) -> tuple[float, float]:
    """Density is the mean over samples of the number of balls of reference images that they lie in, over k: about 1
    for samples as the reference, and more for samples where real images are dense. Coverage is the share of reference
    images with a sample in their ball. Arguments and errors as of `precision_recall`.
    """
    found = manifold(reference, samples, k, k, device)
    return float(found.density_M.mean()), float(found.coverage_N.mean())


def manifold(
    reference: Array,
    samples: Array,
    precision_k: int = PRECISION_K,
    density_k: int = DENSITY_K,
    device: torch.device | str | None = None,
) -> Manifold:
    """All four at once: the distances, which take the time, are the same. Float64, on the CPU."""
    least = max(precision_k, density_k) + 1
    reference_ND, samples_MD = as_pair(reference, samples, ("reference", "samples"), least)
    if device is not None:
        reference_ND, samples_MD = reference_ND.to(device), samples_MD.to(device)
    real, fake = prepare(reference_ND, samples_MD, torch.float32)
    return _counted(real, fake, precision_k, density_k)


def _counted(real: Points, fake: Points, precision_k: int, density_k: int) -> Manifold:
    radii_N2 = neighbour_distances(real, (precision_k, density_k))
    radii_M1 = neighbour_distances(fake, (precision_k,))
    device = radii_N2.device
    precision_M, density_M = torch.zeros(2, len(fake), dtype=torch.float64, device=device)
    covered_N = torch.zeros(len(real), dtype=torch.bool, device=device)
    for part, (near_nN, dense_nN) in balls_around(fake, real, radii_N2):
        precision_M[part.start : part.stop] = near_nN.any(1).double()
        density_M[part.start : part.stop] = dense_nN.sum(1).double() / density_k
        covered_N |= dense_nN.any(0)
    recall_N = torch.zeros(len(real), dtype=torch.float64, device=device)
    for part, (inside_nM,) in balls_around(real, fake, radii_M1):
        recall_N[part.start : part.stop] = inside_nM.any(1).double()
    return Manifold(precision_M.cpu(), recall_N.cpu(), density_M.cpu(), covered_N.double().cpu())
