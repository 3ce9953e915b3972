"""What watches over a run: steps that are not finite, loss spikes, experts that nobody chooses, hangs.

Shapes: S scales, E experts.
"""

from __future__ import annotations

import faulthandler
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from mepa_ds import distributed, log
from mepa_ds.data.training import TrainingBatch
from mepa_ds.errors import UserError
from mepa_ds.files import write_json

# timeout(1)'s: the run made no step for guards.hang_timeout seconds.
HANG_EXIT_CODE = 124
_MAX_ROLLBACKS = 3
# So many spikes in a row are no spike but a new level, which is enough of them to judge by.
_SPIKE_WINDOW, _SPIKE_MIN, _SPIKE_DEVIATIONS = 50, 10, 6.0
# 1 % of the load; with many experts, 8 % of an even share.
_COLLAPSED_SHARE, _COLLAPSED_OF_EVEN, COLLAPSED_STEPS = 0.01, 0.08, 500
SLOW_RANK_RATIO, SLOW_RANK_RECORDS = 1.3, 10


class BadSteps:
    """Counts steps that were skipped because a gradient was not finite."""

    def __init__(self, limit: int, directory: Path):
        self._limit, self.directory = limit, directory
        self.in_a_row = 0
        self.total = 0
        """Of the whole run, whatever was started or taken back since."""
        self._cause = ""
        self._rollbacks: dict[int, int] = {}

    def note(
        self, step: int, applied: bool, batches: Iterable[TrainingBatch], losses: Iterable[Tensor], cause: str
    ) -> bool:
        """Notes one step; True when it is time to go back to a checkpoint. The same on every rank.

        `cause` says what was not finite. The keys of what a bad step has read go to
        `directory/step_<step>_rank_<rank>.json`.
        """
        if applied:
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        self.total += 1
        self._cause = cause
        content = {
            "step": step,
            "not_finite": cause,
            "losses": [str(float(loss)) for loss in losses],
            "positions": [batch.positions_B.tolist() for batch in batches],
            "keys": [list(batch.keys) for batch in batches],
        }
        path = self.directory / f"step_{step:08d}_rank_{distributed.rank():05d}.json"
        try:
            write_json(path, content)
        except OSError as error:  # a full disk does not end a run
            log.note(f"rank {distributed.rank()}: warning: {path} cannot be written: {error}")
        return self.in_a_row >= self._limit

    def rolled_back(self, to_step: int | None) -> None:
        """Raises UserError when going back does not help, or there is nothing to go back to."""
        count = 0 if to_step is None else self._rollbacks.get(to_step, 0) + 1
        if to_step is None or count > _MAX_ROLLBACKS:
            why = "and there is no checkpoint yet" if to_step is None else f"also after {_MAX_ROLLBACKS} rollbacks"
            raise UserError(
                f"guards.max_bad_steps: {self.in_a_row} steps in a row were skipped ({self._cause}: not finite), "
                f"{why}; the keys of their images are in {self.directory}. Look at these, or lower optim.base_lr",
                agreed=True,
            )
        self._rollbacks[to_step] = count
        self.in_a_row = 0


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


class Watchdog:
    """Ends the process when nothing has moved for `timeout` seconds: all stacks to stderr and to a file, exit 124."""

    def __init__(self, timeout: float | None, directory: Path):
        self._timeout, self._directory = timeout, directory
        self._beat = time.monotonic()
        self._stopped = threading.Event()
        if timeout is not None:
            threading.Thread(target=self._watch, args=(timeout,), name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Something has moved."""
        self._beat = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self, timeout: float) -> None:
        while not self._stopped.wait(min(1.0, timeout / 4)):
            if time.monotonic() - self._beat <= timeout:
                continue
            rank = distributed.rank()
            log.note(
                f"error: rank {rank}: no step for {timeout:g} seconds (guards.hang_timeout); stacks of all threads:"
            )
            try:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                self._directory.mkdir(parents=True, exist_ok=True)
                with open(self._directory / f"hang_rank_{rank:05d}.txt", "w") as file:
                    faulthandler.dump_traceback(file=file, all_threads=True)
            finally:
                os._exit(HANG_EXIT_CODE)
