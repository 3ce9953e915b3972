"""Kernel inception distance: the unbiased squared MMD of a polynomial kernel (arXiv 1801.01401).

Shapes: N reference images, M samples, D features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mepa_ds.evaluation.formulas.checks import Array, as_pair
from mepa_ds.progress import Progress

_ROWS = 1000


class Kid(NamedTuple):
    """The squared MMD (it may be negative: it is unbiased) and its standard error."""

    value: float
    error: float


def kid(reference: Array, samples: Array, device: torch.device | str | None = None) -> Kid:
    """The MMD of the kernel (x y / D + 1)^3 between two sets, in float64, over all pairs.

    KID is usually given as a mean over random subsets of 1000 images; all pairs have the same expectation and less
    noise. The error is the jackknife's over the images of both sets.

    Args:
        reference: (N, D), N at least 3. samples: (M, D), M at least 3.
        device: where the products are computed; None: where the samples are.

    Raises:
        UserError: too few rows, other widths, numbers that are not finite.
    """
    reference_ND, samples_MD = as_pair(reference, samples, ("reference", "samples"), least=3)
    device = torch.device(device) if device is not None else samples_MD.device
    reference_ND, samples_MD = reference_ND.to(device, torch.float64), samples_MD.to(device, torch.float64)
    N, M = len(reference_ND), len(samples_MD)
    within_N, within_M = _to_others(reference_ND), _to_others(samples_MD)
    across_N, across_M = _sums(reference_ND, samples_MD)
    between = float(across_N.sum())
    value = float(within_N.sum()) / (N * (N - 1)) + float(within_M.sum()) / (M * (M - 1)) - 2 * between / (N * M)
    variance = sum(
        _jackknife(within, across, between, other)
        for within, across, other in ((within_N, across_N, M), (within_M, across_M, N))
    )
    return Kid(value, variance**0.5)


def _jackknife(within_N: Tensor, across_N: Tensor, between: float, other: int) -> float:
    """Variance from the values without each of the images in turn; what does not depend on them is left out."""
    N = len(within_N)
    left_N = (within_N.sum() - 2 * within_N) / ((N - 1) * (N - 2)) - 2 * (between - across_N) / ((N - 1) * other)
    return float(((left_N - left_N.mean()) ** 2).sum()) * (N - 1) / N


def _to_others(rows_ND: Tensor) -> Tensor:
    """(N,) sums of the kernel of each row with all others."""
    return _sums(rows_ND, rows_ND)[0] - (rows_ND.square().sum(1) / rows_ND.shape[1] + 1) ** 3


def _sums(first_ND: Tensor, second_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the kernel over the second set (N,), and over the first (M,)."""
    rows, columns_M = [], second_MD.new_zeros(len(second_MD))
    for part_ND in Progress(first_ND.split(_ROWS), "kernel", unit="block", delay=5, leave=False):
        kernel_NM = torch.addmm(part_ND.new_ones(()), part_ND, second_MD.T, alpha=1 / first_ND.shape[1]).pow_(3)
        rows.append(kernel_NM.sum(1))
        columns_M += kernel_NM.sum(0)
    return torch.cat(rows), columns_M
