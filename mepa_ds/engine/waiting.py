"""Measures how long a rank waits for other ranks within a step. Only logged steps are measured; others cost nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mepa_ds import distributed


class WaitingClock:
    """Measures waits by their kind. On a GPU a wait is the time in which the computation's stream stands still."""

    def __init__(self) -> None:
        self._on = False
        self._waits: list[tuple[str, float | tuple[torch.cuda.Event, torch.cuda.Event]]] = []

    def start(self, on: bool) -> None:
        """Starts a new step, which is measured if `on`."""
        self._on = on
        self._waits = []

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
            self._waits.append((kind, (begin, end)))
        else:
            began = time.perf_counter()
            yield
            self._waits.append((kind, time.perf_counter() - began))

    @property
    def count(self) -> int:
        """How many waits there were since `start`: a place between two of them."""
        return len(self._waits)

    def seconds(self, kind: str | None = None, first: int = 0, end: int | None = None) -> float:
        """Returns the seconds of the waits from `first` to before `end`, of a kind (None: of all).

        On a GPU their work must be done: it is not waited for.
        """
        waits = [wait for name, wait in self._waits[first:end] if kind in (None, name)]
        return sum(wait if isinstance(wait, float) else wait[0].elapsed_time(wait[1]) / 1000 for wait in waits)
