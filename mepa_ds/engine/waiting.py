"""Measures how long a rank waits for other ranks within a step. Only logged steps are measured; others cost nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mepa_ds import distributed


class WaitingClock:
    """Measures seconds by kind of wait. On a GPU a wait is the time in which the computation's stream stands still."""

    def __init__(self) -> None:
        self._on = False
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, on: bool) -> None:
        """Starts a new step, which is measured if `on`."""
        self._on = on
        self._seconds, self._events = {}, []

    @contextmanager
    def waiting(self, kind: str) -> Iterator[None]:
        """Measures the wait within the context (on a GPU: the call that makes the stream wait)."""
        if not self._on:
            yield
        elif distributed.uses_gpu():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((kind, begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[kind] = self._seconds.get(kind, 0.0) + time.perf_counter() - began

    def seconds(self, kind: str) -> float:
        """Returns the seconds since `start`. On a GPU the work must be done (synchronised)."""
        for name, begin, end in self._events:
            self._seconds[name] = self._seconds.get(name, 0.0) + begin.elapsed_time(end) / 1000
        self._events = []
        return self._seconds.get(kind, 0.0)
