"""Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797): scores by neighbours.

Shapes: N reference images, M samples, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mepa_ds.evaluation.formulas.checks import Array, as_pair
from mepa_ds.evaluation.formulas.neighbours import Points, in_balls, neighbour_distances, prepare

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
    ks = (precision_k,) if density_k == precision_k else (precision_k, density_k)
    radii_NR = neighbour_distances(real, ks)
    own_M = neighbour_distances(fake, (precision_k,))[:, 0]
    precision_M, density_M = torch.zeros(2, len(fake), dtype=torch.float64, device=own_M.device)
    covered_N, recalled_N = torch.zeros(2, len(real), dtype=torch.bool, device=own_M.device)
    for part, inside, holds_mN in in_balls(fake, real, radii_NR, own_M):
        precision_M[part.start : part.stop] = inside[0].any(1).double()
        density_M[part.start : part.stop] = inside[-1].sum(1).double() / density_k
        covered_N |= inside[-1].any(0)
        recalled_N |= holds_mN.any(0)
    return Manifold(precision_M.cpu(), recalled_N.double().cpu(), density_M.cpu(), covered_N.double().cpu())
