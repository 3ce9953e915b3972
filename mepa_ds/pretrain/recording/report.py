"""What one optimizer step leaves behind for its record: losses, norm, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mepa_ds.objective.objective import Losses


@dataclass
class StepReport:
    """One step of this rank. `losses` has one entry a micro-batch.

    A step whose gradient is not finite on any rank is not `applied`: weights and moments stay as they were.
    """

    step: int
    """Its number, from 1."""
    lr: float
    num_scales: int
    """How many scales it trained (train.progressive)."""
    losses: list[Losses]
    grad_norm: float
    """Over all ranks, before clipping."""
    applied: bool
    clock: StepClock


class StepClock:
    """Seconds by part of a step, and this rank's waits for others within each part.

    On a GPU the seconds are those in which work was enqueued, unless the clock is `synchronous`: it then waits for the
    GPU at the end of each part, which costs time itself.
    """

    def __init__(self, synchronous: bool, waited: Callable[[], float]):
        self._synchronous = synchronous and torch.cuda.is_available()
        self._waited = waited
        self.seconds: dict[str, float] = {}
        self.waits: dict[str, float] = {}
        self._began = self._last = time.perf_counter()
        self._waited_before = 0.0
        self.total = self.tokens_waited = 0.0

    def lap(self, part: str) -> None:
        """The time since the last lap belongs to `part`."""
        if self._synchronous:
            torch.cuda.synchronize()
        now, waited = time.perf_counter(), self._waited()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self.waits[part] = self.waits.get(part, 0.0) + waited - self._waited_before
        self._last, self._waited_before = now, waited

    def stop(self, tokens_waited: float) -> None:
        """The step is over: `total` is its time, `tokens_waited` the part of it that waited for tokens to travel."""
        self.total, self.tokens_waited = time.perf_counter() - self._began, tokens_waited
