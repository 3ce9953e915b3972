"""Scores by name as they are computed, each with its standard error and 95 % interval, and what was left out and why.

Shapes: N samples, M reference images, D features, K classes of Inception.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.evaluation.formulas.checks import LARGEST
from mepa_ds.evaluation.formulas.extrapolation import fd_infinity, least_samples
from mepa_ds.evaluation.formulas.gaussian import FrechetTo
from mepa_ds.evaluation.formulas.inception_score import adm_splits, inception_score
from mepa_ds.evaluation.formulas.kernel import kid
from mepa_ds.evaluation.formulas.manifold import DENSITY_K, manifold
from mepa_ds.evaluation.formulas.neighbours import nearest_distances

INTERVAL = ("_error", "_low", "_high")
"""What the names of a score's standard error and of the ends of its 95 % interval end with."""
_Z = 1.959964  # of a 95 % interval
_SHUFFLE_SEED = 0  # of the inception score's splits
_KID_IMAGES = 10_000
_COPY_QUANTILE = 0.01

Score = float | int | None


class Measures:
    """Collects scores. `scores[NAME]`; `NAME_error`, `NAME_low` and `NAME_high` where an interval makes sense."""

    def __init__(self, seed: int, device: torch.device):
        self.scores: dict[str, Score] = {}
        self.left_out: dict[str, str] = {}
        self.remarks: list[str] = []
        self._seed, self._device = seed, device

    def add(self, **scores: Score) -> None:
        self.scores |= scores

    def leave_out(self, name: str, why: str) -> None:
        """The score is None, and the protocol says why."""
        self.scores[name] = None
        self.left_out[name] = why

    def add_with_error(self, name: str, value: float, error: float) -> None:
        self.scores |= with_error(name, value, error)

    def add_share(self, name: str, hits_N: Tensor) -> None:
        """A share of images; its interval is Wilson's, which stays within 0 and 1."""
        count, share = len(hits_N), float(hits_N.mean())
        middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
        half = _Z / (1 + _Z**2 / count) * (share * (1 - share) / count + _Z**2 / (4 * count**2)) ** 0.5
        error = (share * (1 - share) / count) ** 0.5
        low, high = max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))
        self.scores |= {name: share, f"{name}_error": error, f"{name}_low": low, f"{name}_high": high}

    def add_space(
        self, named: Callable[[str], str], samples_ND: Tensor, frechet: FrechetTo, reference_MD: Tensor | None
    ) -> None:
        """All scores of one space. `named`: score -> the name that it gets."""
        count, width = samples_ND.shape
        for rows_ND, what in ((samples_ND, "samples"), (reference_MD, "reference images")):
            if rows_ND is not None and len(rows_ND) and LARGEST < float(rows_ND.abs().max()) < torch.inf:
                raise UserError(
                    f"{named('fd')}: the {what} have features as large as {float(rows_ND.abs().max()):g}, beyond "
                    f"{LARGEST:g}, where no score is a number; scale the features, or see where such values come from"
                )
        samples_ND = samples_ND.to(self._device)
        self.add_frechet(named("fd"), samples_ND, frechet)
        if count <= width:
            self.remarks.append(
                f"{named('fd')}: {count} samples are fewer than the covariance of {width} features needs "
                f"({width + 1}); it is singular, and the distance is far too large. Compare only with equally many"
            )
        if count >= least_samples(width):
            gaussian = frechet.reference
            infinity = fd_infinity(gaussian.mean, gaussian.covariance, samples_ND, self._seed, self._device)
            self.add(**{named("fd_infinity"): infinity})
        else:
            self.leave_out(named("fd_infinity"), f"needs {least_samples(width)} samples, there are {count}")
        self._add_neighbours(named, samples_ND, reference_MD)

    def add_frechet(self, name: str, samples_ND: Tensor, frechet: FrechetTo) -> None:
        self.add_with_error(name, *frechet.distance(samples_ND.to(self._device)))

    def _add_neighbours(self, named: Callable[[str], str], samples_ND: Tensor, reference_MD: Tensor | None) -> None:
        names = [named(score) for score in ("kid", "precision", "recall", "density", "coverage")]
        fewest = 0 if reference_MD is None else min(len(samples_ND), len(reference_MD))
        if reference_MD is None or fewest <= DENSITY_K:
            why = "the reference has statistics alone, and this needs its images"
            if reference_MD is not None:
                why = f"needs more than {DENSITY_K} images in both sets, there are {fewest}"
            for name in names:
                self.leave_out(name, why)
            return
        reference_MD = reference_MD.to(self._device)
        few = kid(_spread(reference_MD, _KID_IMAGES), _spread(samples_ND, _KID_IMAGES))
        self.add_with_error(names[0], few.value, few.error)
        found = manifold(reference_MD, samples_ND)
        self.add_share(names[1], found.precision_M)
        self.add_share(names[2], found.recall_N)
        density_M = found.density_M
        self.add_with_error(names[3], float(density_M.mean()), float(density_M.std()) / len(density_M) ** 0.5)
        self.add_share(names[4], found.coverage_N)

    def add_inception_score(self, logits_NK: Tensor, order: str) -> None:
        """The mean over splits of 5000, 5000, ... images and the rest. In the order of their classes images would
        score a fifth, so they are shuffled, always in the same way. order="file" takes them as they come, as ADM's
        suite does.
        """
        if order == "shuffled":
            logits_NK = logits_NK[np.random.RandomState(_SHUFFLE_SEED).permutation(len(logits_NK))]
        probs_NK = logits_NK.double().softmax(1)
        mean, deviation = inception_score(probs_NK)
        self.add_with_error("inception_score", mean, _inception_error(probs_NK))
        self.add(inception_score_std=deviation)


def with_error(name: str, value: float, error: float) -> dict[str, float]:
    """A score under its name, with its standard error and 95 % interval."""
    return {
        name: value, f"{name}_error": error, f"{name}_low": value - _Z * error, f"{name}_high": value + _Z * error
    }  # fmt: skip


def _inception_error(probs_NK: Tensor) -> float:
    """By each image's influence: the score of a split is exp of a mean of divergences, to the first order."""
    variances = []
    splits = probs_NK.split(adm_splits(len(probs_NK)))
    for part_NK in splits:
        divergences_N = (torch.xlogy(part_NK, part_NK) - torch.xlogy(part_NK, part_NK.mean(0))).sum(1)
        deviation = float(divergences_N.std(correction=0))
        variances.append((float(divergences_N.mean().exp()) * deviation) ** 2 / len(part_NK))
    return sum(variances) ** 0.5 / len(splits)


def nearest_to_training(
    samples_ND: Tensor, train_TD: Tensor, heldout_HD: Tensor, device: torch.device
) -> dict[str, Score]:
    """Memorisation: distances of samples to their nearest training image beside those of held-out images.

    `memorisation_samples` and `memorisation_heldout` are the median distances. `memorisation_nearer` is the
    probability that a sample is nearer than a held-out image: 0.5 for samples that are new images of the same kind.
    `memorisation_copies` is the share of samples that are nearer than all but 1 % of the held-out images: 0.01.
    """
    if samples_ND.shape[1] != train_TD.shape[1]:
        raise UserError("memorisation: samples and training images are of different feature spaces")
    mine_N = nearest_distances(samples_ND.to(device), train_TD.to(device)).cpu().numpy()
    theirs_H = np.sort(nearest_distances(heldout_HD.to(device), train_TD.to(device)).cpu().numpy())
    # Ties count half.
    farther = len(theirs_H) - (
        np.searchsorted(theirs_H, mine_N, "left") + np.searchsorted(theirs_H, mine_N, "right")
    ) / 2  # fmt: skip
    threshold = float(np.quantile(theirs_H, _COPY_QUANTILE, method="lower"))
    return {
        "memorisation_samples": float(np.median(mine_N)),
        "memorisation_heldout": float(np.median(theirs_H)),
        "memorisation_nearer": float(farther.mean() / len(theirs_H)),
        "memorisation_copies": float((mine_N < threshold).mean()),
    }


def _spread(rows_ND: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly spread."""
    if len(rows_ND) <= most:
        return rows_ND
    return rows_ND[torch.linspace(0, len(rows_ND) - 1, most).round().long().to(rows_ND.device)]
