"""One run at this moment: its state, and the last of its records."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mepa_ds.runtime.metrics import METRICS_NAME
from mepa_ds.runtime.run_lock import is_held
from mepa_ds.runtime.status import STATUS_NAME, read_status
from mepa_ds.watching.tail import MetricsTail

_LOSSES = 240
_LARGEST = 1e30
# A file system without locks: a run that has written its status so lately is taken to be running.
_FRESH_SECONDS = 120.0
_STATES = {"requeue": "stopped"}


@dataclass
class RunNow:
    """What a run's files say at one moment. Entries are missing where nothing was recorded."""

    path: Path
    state: str
    """running, stopped, killed, finished, failed, diverged; not started: nothing was written; not there."""
    step: int = 0
    num_steps: int | None = None
    status: dict[str, Any] = field(default_factory=dict)
    """status.json: seconds_left, error and others."""
    train: dict[str, Any] = field(default_factory=dict)
    """The last record `train`."""
    heldout: dict[str, Any] = field(default_factory=dict)
    """The last record `heldout`."""
    warning: tuple[int, str] | None = None
    """Step and text of the last warning."""
    losses: list[float] = field(default_factory=list)
    """Of the last records, oldest first; finite ones alone."""


class WatchedRun:
    """A run's directory, looked at again and again; it need not be there yet."""

    def __init__(self, path: Path):
        self._path = path
        self._tail = MetricsTail(path / METRICS_NAME)
        self._forget()

    def look(self) -> RunNow:
        """Reads what is new. Never raises, whatever the run does to its files meanwhile."""
        records, anew = self._tail.read()
        if anew:
            self._forget()
        for record in records:
            self._note(record)
        status = read_status(self._path)
        step = max(_integer(status.get("step")), 0 if status else _integer(self._train.get("step")))
        num_steps = status.get("num_steps")
        return RunNow(
            self._path,
            self._state(status),
            step,
            num_steps if isinstance(num_steps, int) and num_steps > 0 else None,
            status,
            self._train,
            self._heldout,
            self._warning,
            list(self._losses),
        )

    def _forget(self) -> None:
        self._train: dict[str, Any] = {}
        self._heldout: dict[str, Any] = {}
        self._warning: tuple[int, str] | None = None
        self._losses: deque[float] = deque(maxlen=_LOSSES)

    def _note(self, record: dict[str, Any]) -> None:
        event = record.get("event")
        if event == "train":
            self._train = record
            if isinstance(loss := record.get("loss"), (int, float)) and abs(loss) < _LARGEST:
                self._losses.append(float(loss))
        elif event == "heldout":
            self._heldout = record
        if isinstance(message := record.get("message"), str):
            self._warning = (_integer(record.get("step")), message)

    def _state(self, status: dict[str, Any]) -> str:
        told = str(status.get("state", ""))
        if is_held(self._path):
            return "running" if told == "running" else "starting"
        if not told:
            return "not started" if self._path.is_dir() else "not there"
        if told == "running":
            with suppress(OSError):
                if time.time() - (self._path / STATUS_NAME).stat().st_mtime < _FRESH_SECONDS:
                    return "running"
            return "killed"
        return _STATES.get(told, told)


def _integer(value: Any) -> int:
    return value if isinstance(value, int) else 0
