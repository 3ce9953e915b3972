"""Paired comparisons of arms over seeds: a two-way layout (arm + seed), the textbook analysis of randomised blocks.

Runs of one seed share images, their order and dropped labels, so the seed's part of a score cancels in a difference.
What is left is taken to be noise of one size in all arms; its standard deviation is estimated from all arms together,
since a single pair has two or three differences only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Scores = Mapping[str, Mapping[int, float]]
"""A score by arm and seed; runs that are missing are left out."""
LEVEL = 0.95


@dataclass(frozen=True)
class Noise:
    """What is left of a score when an arm's and a seed's means are taken away."""

    deviation: float
    """Standard deviation of one run."""
    degrees: int
    """Degrees of freedom."""

    def half_width(self, num_seeds: int) -> float:
        """Half of the 95 % interval of a difference of two arms with so many common seeds."""
        quantile = float(stats.t.ppf(0.5 + LEVEL / 2, self.degrees)) if self.degrees > 0 else np.nan
        return quantile * self.deviation * np.sqrt(2 / num_seeds)


@dataclass(frozen=True)
class Difference:
    """One score of `arm` minus that of `against`."""

    arm: str
    against: str
    by_seed: tuple[float, ...]
    mean: float
    low: float
    high: float
    p_value: float
    """Two-sided, of no difference; nan where there is no degree of freedom."""
    is_clear: bool
    """Whether it stays below 5 % when it is multiplied by the number of comparisons (Bonferroni)."""


def noise_of(scores: Scores) -> Noise:
    """Least squares of score = arm + seed over all runs that there are."""
    cells = [(arm, seed, value) for arm, by_seed in scores.items() for seed, value in by_seed.items()]
    arms = sorted({arm for arm, _, _ in cells})
    seeds = sorted({seed for _, seed, _ in cells})
    if not cells:
        return Noise(np.nan, 0)
    design = np.zeros((len(cells), len(arms) + len(seeds)))
    for row, (arm, seed, _) in enumerate(cells):
        design[row, arms.index(arm)] = 1
        design[row, len(arms) + seeds.index(seed)] = 1
    values = np.array([value for _, _, value in cells])
    solution, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    degrees = len(cells) - int(rank)
    if degrees < 1:
        return Noise(np.nan, 0)
    return Noise(float(np.sqrt(np.square(values - design @ solution).sum() / degrees)), degrees)


def differences(scores: Scores, pairs: Sequence[tuple[str, str]]) -> list[Difference]:
    """The differences of all pairs that share a seed, with 95 % intervals."""
    noise, found = noise_of(scores), []
    for arm, against in pairs:
        common = sorted(scores.get(arm, {}).keys() & scores.get(against, {}).keys())
        if not common:
            continue
        by_seed = tuple(scores[arm][seed] - scores[against][seed] for seed in common)
        mean, half = float(np.mean(by_seed)), noise.half_width(len(common))
        error = noise.deviation * np.sqrt(2 / len(common))
        p_value = float(2 * stats.t.sf(abs(mean) / error, noise.degrees)) if noise.degrees and error > 0 else np.nan
        is_clear = bool(p_value * len(pairs) < 1 - LEVEL)
        found.append(Difference(arm, against, by_seed, mean, mean - half, mean + half, p_value, is_clear))
    return found
