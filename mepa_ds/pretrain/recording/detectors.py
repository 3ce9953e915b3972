"""Detectors of problems that nobody may be watching for: loss spikes, experts that no token chooses, a slow rank.

Shapes: S scales, E experts.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

# `_SPIKE_MIN` losses are enough to judge by. As many spikes in a row are a new level of the loss, not a spike.
_SPIKE_WINDOW, _SPIKE_MIN, _SPIKE_DEVIATIONS = 50, 10, 6.0
# An expert has collapsed below 1 % of the load or, with many experts, below 8 % of an even share.
_COLLAPSED_SHARE, _COLLAPSED_OF_EVEN, COLLAPSED_STEPS = 0.01, 0.08, 500
SLOW_RANK_RATIO, SLOW_RANK_RECORDS = 1.3, 10


class SpikeDetector:
    """Finds a loss that is more than 6 deviations above the median of the last 50 losses.

    The deviation is 1.4826 times the median absolute deviation, and at least 1 % of the median.
    """

    def __init__(self, history: Iterable[float]):
        self._recent: deque[float] = deque(history, maxlen=_SPIKE_WINDOW)
        self._spikes: list[float] = []

    def __call__(self, loss: float) -> bool:
        """Returns whether this loss is a spike. Other losses join the recent ones; 10 spikes in a row replace them."""
        if not math.isfinite(loss):
            return True
        if len(self._recent) >= _SPIKE_MIN:
            median = statistics.median(self._recent)
            deviation = statistics.median(abs(value - median) for value in self._recent)
            if loss - median > _SPIKE_DEVIATIONS * max(1.4826 * deviation, 0.01 * abs(median)):
                self._spikes.append(loss)
                if len(self._spikes) == _SPIKE_MIN:
                    self._recent = deque(self._spikes, maxlen=_SPIKE_WINDOW)
                    self._spikes.clear()
                return True
        self._spikes.clear()
        self._recent.append(loss)
        return False


class CollapseDetector:
    """Finds experts with less than min(1 %, 8 % of an even share) of the routed pairs at every record of 500 steps."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, int], int] = {}

    def __call__(self, step: int, layers: dict[str, dict[str, Any]]) -> list[str]:
        """Takes the routing record of `step`; returns "layer.expert" for each collapsed expert."""
        for layer, report in layers.items():
            limit = min(_COLLAPSED_SHARE, _COLLAPSED_OF_EVEN / len(report["load"]))
            for expert, share in enumerate(report["load"]):
                if share < limit:
                    self._since.setdefault((layer, expert), step)
                else:
                    self._since.pop((layer, expert), None)
        return [
            f"{layer}.{expert}" for (layer, expert), since in self._since.items() if step - since >= COLLAPSED_STEPS
        ]


class SlowRankDetector:
    """Finds a rank that takes over 1.3 times as long for its own work as the fastest rank, in 10 records in a row."""

    def __init__(self) -> None:
        self._rank, self._records = -1, 0

    def __call__(self, own: dict[str, float]) -> int | None:
        """Takes `{"min", "max", "max_rank"}` of one record; returns the slow rank, once every 10 records."""
        rank = int(own["max_rank"])
        if own["max"] <= SLOW_RANK_RATIO * own["min"]:
            rank = -1
        self._records = self._records + 1 if rank == self._rank else 1
        self._rank = rank
        if rank < 0 or self._records < SLOW_RANK_RECORDS:
            return None
        self._records = 0
        return rank
