"""The Frechet distance that infinitely many samples would have (FID-infinity, arXiv 1911.07023).

Shapes: N samples, D features.
"""

from __future__ import annotations

import numpy as np
import torch

from mepa_ds.errors import UserError
from mepa_ds.evaluation.formulas.checks import Array, as_rows
from mepa_ds.evaluation.formulas.gaussian import Gaussian, frechet_distance
from mepa_ds.progress import Progress

PIECES = (1, 2, 3, 4)
"""Into how many equal pieces the samples are cut, one after the other; the distance is the mean over the pieces."""
LEAST_PER_FEATURE = 2
"""Images that the smallest piece must have for each feature: below, the bias is no longer one over their number."""


def fd_infinity(
    mu: Array, sigma: Array, samples: Array, seed: int = 0, device: torch.device | str | None = None
) -> float:
    """The distance of N samples is too large by about c / N, so a line through distances at N, N/2, N/3 and N/4 against
    one over the number of samples meets zero at the distance without that bias.

    The original draws overlapping subsets; disjoint pieces use every sample at every size, which is less noisy. The
    bias of the reference's own statistics stays.

    Args:
        mu, sigma: of the reference, (D,) and (D, D).
        samples: (N, D); N at least 8 D, so that the smallest piece has 2 D.
        seed: of the order in which samples are dealt to the pieces.

    Raises:
        UserError: too few samples, or what `frechet_distance` refuses.
    """
    samples_ND = as_rows(samples, "samples", least=2)
    least = least_samples(samples_ND.shape[1])
    if len(samples_ND) < least:
        raise UserError(
            f"samples: {len(samples_ND)} images of {samples_ND.shape[1]} features are too few to extrapolate from; "
            f"at least {least} are needed"
        )
    order_N = torch.from_numpy(np.random.default_rng(seed).permutation(len(samples_ND))).to(samples_ND.device)
    inverses, distances = [], []
    for pieces in Progress(PIECES, "extrapolating", unit="size", delay=5, leave=False):
        size = len(samples_ND) // pieces
        found = []
        for piece in range(pieces):
            part = Gaussian.of(samples_ND[order_N[piece * size : (piece + 1) * size]])
            found.append(frechet_distance(part.mean, part.covariance, mu, sigma, device))
        inverses.append(1 / size)
        distances.append(float(np.mean(found)))
    _, intercept = np.polyfit(inverses, distances, 1)
    return float(intercept)


def least_samples(width: int) -> int:
    """Samples that `fd_infinity` needs for so many features."""
    return LEAST_PER_FEATURE * PIECES[-1] * width
