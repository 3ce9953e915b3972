"""Moves dead codes of the tokenizer to residuals of the step's global batch.

Shape legend: G images of the global batch, L tokens over all scales, N of their tokens that count, D dead codes,
C code width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self


@dataclass
class Revival:
    """Holds the residual of the step's global batch to which each dead code moves. Each rank fills in its own."""

    dead_D: Tensor
    sample_D: Tensor
    """The number of the image in the global batch."""
    token_D: Tensor
    values_DC: Tensor

    @classmethod
    def drawn(cls, dead_D: Tensor, counts_GL: Tensor, code_width: int, key: Sequence[int]) -> Self:
        """Draws tokens in random order, each token once before any token twice.

        Repeats are avoided because of two equal codes only the first is ever the nearest.

        Args:
            counts_GL: bool; False at scales that an image leaves out, because no code will stand for their residuals.
            key: the seed of the random numbers. (numpy keeps raw random numbers the same from version to version.)
        """
        candidates_N2 = counts_GL.nonzero()
        numbers_N = np.random.Philox(np.random.SeedSequence(list(key))).random_raw(len(candidates_N2))
        order_D = np.resize(np.argsort(numbers_N, kind="stable"), len(dead_D))
        sample_D, token_D = candidates_N2[torch.from_numpy(order_D).to(counts_GL.device)].unbind(1)
        return cls(dead_D, sample_D, token_D, torch.zeros(len(dead_D), code_width, device=dead_D.device))

    def collect(self, residuals_BLC: Tensor, offset: int) -> None:
        """Takes the chosen residuals of a micro-batch whose first image is number `offset` of the global batch."""
        here_D = (self.sample_D >= offset) & (self.sample_D < offset + len(residuals_BLC))
        self.values_DC[here_D] = residuals_BLC[self.sample_D[here_D] - offset, self.token_D[here_D]]
