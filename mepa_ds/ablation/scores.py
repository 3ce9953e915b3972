"""Which scores an ablation shows, what they are called, and which way is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mepa_ds.ablation.results import LOAD_VARIANCE

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Score:
    """A column of the table of runs."""

    column: str
    title: str
    better: Better
    digits: int


_KNOWN = (
    Score("ce", "held-out cross-entropy", "lower", 4),
    Score("ce_last", "cross-entropy, last scale", "lower", 4),
    Score("class_agreement", "class agreement", "higher", 3),
    Score(LOAD_VARIANCE, "variance of expert load", "lower", 2),
)
_FID, _FRECHET = "fid", ".fd"
"""The column of FID, and what those of Frechet distances in other feature spaces end with."""


def shown(columns: Sequence[str]) -> list[Score]:
    """The scores that stand in the report's first table: losses, class agreement, Frechet distances, expert load."""
    known = {score.column: score for score in _KNOWN if score.column in columns}
    distances = [
        Score(name, _distance_title(name), "lower", 3) for name in columns if name == _FID or name.endswith(_FRECHET)
    ]
    first = [score for name, score in known.items() if name != LOAD_VARIANCE]
    return [*first, *distances, *([known[LOAD_VARIANCE]] if LOAD_VARIANCE in known else [])]


def of_scales(columns: Sequence[str]) -> list[Score]:
    """The held-out cross-entropy of each scale, coarse to fine."""
    scales = sorted(int(name.rpartition("_")[2]) for name in columns if name.startswith("ce_scale_"))
    return [Score(f"ce_scale_{scale}", f"scale {scale}", "lower", 4) for scale in scales]


def _distance_title(column: str) -> str:
    return "FID" if column == _FID else f"FD ({column.removesuffix(_FRECHET)})"
