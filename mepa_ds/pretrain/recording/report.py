"""The report of one optimizer step for its record: losses, gradient norm, and seconds by part."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mepa_ds import distributed
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
    """Measures seconds by part of a step, and this rank's waits for other ranks within each part.

    On a GPU only the time to enqueue the work is measured, unless the clock is `synchronous`. A synchronous clock waits
    for the GPU at the end of each part, which itself costs time.
    """

    def __init__(self, synchronous: bool, waited: Callable[[], float]):
        self._synchronous = synchronous and distributed.uses_gpu()
        self._waited = waited
        self.seconds: dict[str, float] = {}
        self.waits: dict[str, float] = {}
        self._began = self._last = time.perf_counter()
        self._waited_before = 0.0
        self.total = self.tokens_waited = 0.0

    def lap(self, part: str) -> None:
        """Adds the time since the last lap to `part`."""
        if self._synchronous:
            torch.cuda.synchronize()
        now, waited = time.perf_counter(), self._waited()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self.waits[part] = self.waits.get(part, 0.0) + waited - self._waited_before
        self._last, self._waited_before = now, waited

    def stop(self, tokens_waited: float) -> None:
        """Ends the step: `total` is its time, and `tokens_waited` is the part spent waiting for travelling tokens."""
        self.total, self.tokens_waited = time.perf_counter() - self._began, tokens_waited
