"""The inception score (arXiv 1606.03498).

Shapes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from mepa_ds.errors import UserError
from mepa_ds.evaluation.formulas.checks import Array, as_rows

SPLIT = 5000
"""Images in a split, as ADM's suite cuts them."""
_SUM = 1e-3


class InceptionScore(NamedTuple):
    """Mean over splits, and their standard deviation (None for a single split)."""

    mean: float
    deviation: float | None


def inception_score(probs: Array, splits: Sequence[int] | None = None) -> InceptionScore:
    """For each split exp of the mean KL divergence of its images' predictions from their mean; then the mean.

    Args:
        probs: (N, C) probabilities; rows add up to 1.
        splits: sizes of consecutive splits, which add up to N. None: 5000, 5000, ... and the rest, as ADM's suite.

    Raises:
        UserError: rows that are no probabilities, or splits that do not add up.
    """
    probs_NC = as_rows(probs, "probabilities").double()
    if float(probs_NC.min()) < 0 or float((probs_NC.sum(1) - 1).abs().max()) > _SUM:
        raise UserError("probabilities: rows must be at least 0 and add up to 1 (a softmax of logits)")
    sizes = adm_splits(len(probs_NC)) if splits is None else list(splits)
    if sum(sizes) != len(probs_NC) or min(sizes) < 1:
        raise UserError(f"splits: {sizes} do not add up to the {len(probs_NC)} images")
    scores = []
    for part_NC in probs_NC.split(sizes):
        mean_C = part_NC.mean(0)
        # xlogy: a probability of 0 adds 0, and not 0 times infinity.
        divergences_N = torch.xlogy(part_NC, part_NC).sum(1) - torch.xlogy(part_NC, mean_C).sum(1)
        scores.append(float(divergences_N.mean().exp()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)) if len(scores) > 1 else None)


def adm_splits(count: int) -> list[int]:
    return [min(SPLIT, count - first) for first in range(0, count, SPLIT)]
