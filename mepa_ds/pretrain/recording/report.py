"""The report of one optimizer step for its record: losses, gradient norm, and seconds by part."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import torch

from mepa_ds import distributed
from mepa_ds.engine.waiting import WaitingClock
from mepa_ds.objective.objective import Losses


@dataclass
class StepReport:
    """One step of this rank. `losses` has one entry per micro-batch.

    When the gradient is not finite on some rank, the step is not `applied`: weights and moments stay as they were.
    """

    step: int
    """The number of the step, from 1."""
    lr: float
    num_scales: int
    """The number of scales that the step trained (train.progressive)."""
    losses: list[Losses]
    grad_norm: float
    """The norm over all ranks, before clipping."""
    applied: bool
    clock: StepClock


class StepClock:
    """Measures the seconds of a step and, if it is `timed`, of its parts and of the waits for other ranks in them.

    A GPU's work is measured by events in its queue, so a timed step takes no longer than others. The time of a part in
    which the GPU has nothing to do, as while it waits for data, counts in the same way.
    """

    def __init__(self, timed: bool, waits: WaitingClock):
        self._timed, self._waits = timed, waits
        self._on_gpu = timed and distributed.uses_gpu()
        self.seconds: dict[str, float] = {}
        """By part, once the step has ended."""
        self.waits: dict[str, float] = {}
        self.total = self.tokens_waited = 0.0
        self._began = time.perf_counter()
        self._laps = [("", self._now(), 0)]

    def lap(self, part: str) -> None:
        """Ends `part`, which began at the last lap. A part may come again; its times are added."""
        if self._timed:
            self._laps.append((part, self._now(), self._waits.count))

    def stop(self) -> None:
        """Ends the step: `total` is its time, and `tokens_waited` is the part spent waiting for travelling tokens."""
        if self._on_gpu:
            torch.cuda.synchronize()  # next to nothing is left to do: the update has waited for the gradients' norm
        self.total = time.perf_counter() - self._began
        for (_, began, first_wait), (part, ended, end_wait) in itertools.pairwise(self._laps):
            self.seconds[part] = self.seconds.get(part, 0.0) + _seconds_between(began, ended)
            self.waits[part] = self.waits.get(part, 0.0) + self._waits.seconds(None, first_wait, end_wait)
        self.tokens_waited = self._waits.seconds("all_to_all")

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(began: float | torch.cuda.Event, ended: float | torch.cuda.Event) -> float:
    if isinstance(began, float) and isinstance(ended, float):
        return ended - began
    assert not isinstance(began, float)
    assert not isinstance(ended, float)
    return began.elapsed_time(ended) / 1000
