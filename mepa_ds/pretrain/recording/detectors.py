"""What numbers of a run say that nobody may be looking at: loss spikes, experts that nobody chooses, a slow rank.

Shapes: S scales, E experts.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

# So many spikes in a row are no spike but a new level, which is enough of them to judge by.
_SPIKE_WINDOW, _SPIKE_MIN, _SPIKE_DEVIATIONS = 50, 10, 6.0
# 1 % of the load; with many experts, 8 % of an even share.
_COLLAPSED_SHARE, _COLLAPSED_OF_EVEN, COLLAPSED_STEPS = 0.01, 0.08, 500
SLOW_RANK_RATIO, SLOW_RANK_RECORDS = 1.3, 10


class SpikeDetector:
    """A loss far above the recent ones: more than 6 deviations (of their median) over the median of the last 50."""

    def __init__(self, history: Iterable[float]):
        self._recent: deque[float] = deque(history, maxlen=_SPIKE_WINDOW)
        self._spikes: list[float] = []

    def __call__(self, loss: float) -> bool:
        """Whether this loss is a spike; it joins the recent ones unless it is. 10 in a row take their place."""
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
    """Experts with less than min(1 %, 8 % of an even share) of the routed pairs at every record of 500 steps."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, int], int] = {}

    def __call__(self, step: int, layers: dict[str, dict[str, Any]]) -> list[str]:
        """From the routing record of `step`: "layer.expert" of all that are collapsed."""
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
    """One rank that takes more than 1.3 times as long for its own work as the fastest one, in 10 records running."""

    def __init__(self) -> None:
        self._rank, self._records = -1, 0

    def __call__(self, own: dict[str, float]) -> int | None:
        """From `{"min", "max", "max_rank"}` of one record: the slow rank, once every 10 records."""
        rank = int(own["max_rank"])
        if own["max"] <= SLOW_RANK_RATIO * own["min"]:
            rank = -1
        self._records = self._records + 1 if rank == self._rank else 1
        self._rank = rank
        if rank < 0 or self._records < SLOW_RANK_RECORDS:
            return None
        self._records = 0
        return rank
