"""Principal components of a stream of vectors, deterministic and without holding the vectors.

Shape legend: N rows, C width, K components.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mepa_ds.errors import UserError


class RunningCovariance:
    """Mean and covariance of rows that arrive in blocks, accumulated in float64."""

    def __init__(self, width: int):
        self.count = 0
        self._sum_C = torch.zeros(width, dtype=torch.float64)
        self._outer_CC = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows_NC: Tensor) -> None:
        """Adds rows (N, C) of any float type, from any device; the product runs where the rows are."""
        rows_NC = rows_NC.detach().double()
        self.count += len(rows_NC)
        self._sum_C += rows_NC.sum(0).cpu()
        self._outer_CC += (rows_NC.T @ rows_NC).cpu()

    def principal_components(self, num_components: int) -> tuple[Tensor, Tensor, Tensor]:
        """(mean_C, components_KC, variances_K), float32, by falling variance.

        A component's sign is free: its entry of largest magnitude is made positive, so that the same rows give the
        same basis. Raises UserError for more components than the width or than the rows can carry.
        """
        width = len(self._sum_C)
        if not 0 < num_components <= min(width, self.count - 1):
            raise UserError(
                f"PCA: {num_components} components asked of {self.count} vectors of width {width}; "
                f"give 1 to {max(min(width, self.count - 1), 1)}, or more images"
            )
        mean_C = self._sum_C / self.count
        covariance_CC = self._outer_CC / self.count - torch.outer(mean_C, mean_C)
        variances_C, vectors_CC = torch.linalg.eigh(covariance_CC)  # by rising variance, vectors in columns
        components_KC = vectors_CC.T.flip(0)[:num_components]
        peak_K1 = components_KC.abs().argmax(dim=1, keepdim=True)
        components_KC = components_KC * components_KC.gather(1, peak_K1).sign()
        variances_K = variances_C.flip(0)[:num_components].clamp_min(0)
        return mean_C.float(), components_KC.float().contiguous(), variances_K.float()
