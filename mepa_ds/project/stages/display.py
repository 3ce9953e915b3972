"""One progress display over all stages: on a terminal a bar below their lines, in a log the time left at each start."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

from tqdm import tqdm
from typing_extensions import Self

from mepa_ds import log
from mepa_ds.watching.run import WatchedRun

_EVERY_SECONDS = 0.5


@dataclass(frozen=True)
class Expected:
    """What is known of a stage's duration before it begins."""

    seconds: float = 0.0
    """By the plan; 0: unknown."""
    run: Path | None = None
    """The directory of a training run, whose files tell how far it is."""
    steps: int = 0
    """Steps of that run."""

    @cached_property
    def _watched(self) -> WatchedRun | None:
        return None if self.run is None else WatchedRun(self.run)

    def share_done(self, seconds: float) -> float:
        """From 0 to 1: by the run's files, else by the clock, which never says that all is done."""
        if self._watched is not None and self.steps and (step := self._watched.look().step):
            return min(step / self.steps, 1.0)
        return min(seconds / self.seconds, 0.95) if self.seconds else 0.0


class Display:
    """Says lines, and where the stages are. `has_bar`: stderr is a terminal.

    The time left is the plan's, times how much slower than planned the stages so far have been.
    """

    def __init__(self, expected: Sequence[Expected], names: Sequence[str]):
        self._expected, self._names = list(expected), list(names)
        self._spent: dict[int, float] = {}
        self._index, self._started, self._before = 0, time.monotonic(), 0.0
        self._ended = threading.Event()
        total = sum(stage.seconds for stage in expected)
        self.has_bar = bool(total) and sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            disable=not self.has_bar,
            bar_format="{desc} |{bar}| {percentage:3.0f} %{postfix}",
            leave=False,
        )
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> Self:
        if self.has_bar:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._bar.close()

    def say(self, line: str) -> None:
        """A line of the log, above the bar."""
        if self.has_bar:
            self._bar.write(log.shown(line))
        else:
            log.say(line, flush=True)

    def begin(self, index: int, spent_before: float) -> str:
        """A stage starts, on which earlier starts have spent so many seconds. Returns what to say of the time left."""
        self._index, self._started, self._before = index, time.monotonic(), spent_before
        if not self._expected[index].seconds:
            return ""
        return f" (about {in_words(self._left(0.0))} left in all)"

    def end(self, index: int, seconds: float) -> None:
        if self._expected[index].seconds:
            self._spent[index] = seconds

    def skip(self, index: int) -> None:
        """The stage was done before: it neither takes time nor tells how fast the machine is."""
        self._expected[index] = Expected()
        self._bar.total = sum(stage.seconds for stage in self._expected) or 1.0

    def _left(self, share: float) -> float:
        planned = sum(self._expected[index].seconds for index in self._spent)
        slower = sum(self._spent.values()) / planned if planned else 1.0
        later = sum(stage.seconds for stage in self._expected[self._index + 1 :])
        return min(max(slower, 0.2), 20.0) * (self._expected[self._index].seconds * (1 - share) + later)

    def _refresh(self) -> None:
        while not self._ended.wait(_EVERY_SECONDS):
            stage = self._expected[self._index]
            share = stage.share_done(self._before + time.monotonic() - self._started)
            done = sum(stage.seconds for stage in self._expected[: self._index]) + share * stage.seconds
            self._bar.n = done
            self._bar.set_description_str(f"{self._index + 1}/{len(self._names)} {self._names[self._index]}", False)
            self._bar.set_postfix_str(f"about {in_words(self._left(share))} left", True)


def in_words(seconds: float) -> str:
    """`40 s`, `7 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
