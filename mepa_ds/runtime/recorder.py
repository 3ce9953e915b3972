"""Writes a run's numbers: first to metrics.jsonl, then to the log, a progress bar, and the trackers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mepa_ds import distributed, log
from mepa_ds.files import read_file
from mepa_ds.machine import peak_resident_bytes
from mepa_ds.runtime.log_line import LogLine, words_of_pretraining
from mepa_ds.runtime.metrics import METRICS_NAME, MetricsWriter, finite, read_metrics
from mepa_ds.runtime.status import STATUS_NAME, RunStatus, write_status
from mepa_ds.runtime.trackers.selection import Chosen, load_maps, scalars
from mepa_ds.runtime.trackers.tracker import Pixels, Tracker
from mepa_ds.safety.pictures import open_image

_STATUS_SECONDS = 1.0


class Recorder:
    """The recorder of all ranks except the main one: it accepts everything and records nothing. See `RunRecorder`."""

    num_records = 0
    """The number of records in metrics.jsonl."""

    def rewind(self, step: int, num_kept: int) -> None:
        """Goes back to a checkpoint: drops later records except warnings, because those steps are recorded again."""

    def past_losses(self) -> list[float]:
        """Returns the losses of single steps: one for each record of earlier starts."""
        return []

    def advance(self, step: int) -> None:
        """Notes that a step is done; status.json shows it within a second or two."""

    def record(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Writes a record of the kind `event` to metrics.jsonl and the trackers."""

    def say(self, line: str) -> None:
        """Prints a line on the terminal, above the progress bar."""

    def warn(self, kind: str, step: int, line: str, **values: Any) -> None:
        """Writes a record of the kind `kind` and a line in the log."""

    def training(self, step: int, values: dict[str, Any]) -> None:
        """Writes the record `train` and its line in the log."""

    def close(self, state: RunStatus, step: int, line: str, **facts: Any) -> None:
        """Prints and stores how the run ended."""


class RunRecorder(Recorder):
    """The recorder of the main rank. `num_kept` records of earlier starts stay; later records are dropped."""

    def __init__(
        self,
        output_dir: Path,
        step: int,
        num_steps: int,
        num_kept: int,
        trackers: Sequence[Tracker] = (),
        tracked: Chosen = "short",
    ):
        self._directory = output_dir
        self._path = output_dir / METRICS_NAME
        self._bar = tqdm(total=num_steps, initial=step, desc="pretraining", unit="step", disable=None)
        self._num_steps = num_steps
        self._recent: dict[str, Any] = {}
        """Numbers of the last record, for status.json."""
        self._routing: dict[str, Any] | None = None
        """The last record `routing` of this start."""
        self._line = LogLine(num_steps)
        self._status_due, self._status_failed = 0.0, False
        self._metrics = MetricsWriter(self._path, resume_step=None)
        self.num_records = self._metrics.rewind(num_kept, keep_warnings=False)
        self._recall()
        self._status("running", step)
        self._trackers, self._tracked = trackers, tracked

    def rewind(self, step: int, num_kept: int) -> None:
        self.num_records = self._metrics.rewind(num_kept, keep_warnings=True)
        for tracker in self._trackers:
            tracker.rewind(step)
        self._recall()
        self._line.restart()
        self._bar.n = step
        self._bar.refresh()

    def past_losses(self) -> list[float]:
        return self._past_losses

    def _recall(self) -> None:
        """Reads what earlier starts have recorded, once: a long run's records are large."""
        losses, scores = list[Any](), list[Any]()
        for record in read_metrics(self._path):
            if record.get("event") == "train":
                losses.append(record.get("step_loss", record.get("loss")))
            elif record.get("event") == "heldout":
                scores.append(record.get("ce"))
        self._past_losses = [loss for loss in losses if isinstance(loss, float)]
        self._heldout_ce: float | None = scores[-1] if scores and isinstance(scores[-1], float) else None

    def advance(self, step: int) -> None:
        self._bar.update()
        now = time.monotonic()
        self._line.begin(step, now)  # not with the start: a first step may compile for minutes
        if now >= self._status_due:
            self._status("running", step)

    def record(self, event: str, step: int, values: dict[str, Any]) -> None:
        self._metrics.write({"event": event, "step": step, **values})
        self.num_records += 1
        if event == "heldout" and isinstance(values["ce"], float):
            self._heldout_ce = values["ce"]
        if event == "routing":
            self._routing = values
        if self._trackers:
            self._track(event, step, values)

    def _track(self, event: str, step: int, values: dict[str, Any]) -> None:
        if numbers := scalars(event, values, self._tracked):
            for tracker in self._trackers:
                tracker.add(numbers, step)
        for name, pixels_HW3 in self._pictures(event, values):
            for tracker in self._trackers:
                tracker.add_picture(name, pixels_HW3, step)

    def _pictures(self, event: str, values: dict[str, Any]) -> Iterator[tuple[str, Pixels]]:
        """Yields the pictures that belong to a record: samples, and with each evaluation what the experts get."""
        if event == "samples":
            with suppress(OSError):
                picture = open_image(read_file(self._directory / values["path"]), ("PNG",))
                yield "samples", np.asarray(picture.convert("RGB"))
        elif event == "heldout" and self._routing is not None:
            yield from load_maps(self._routing).items()

    def say(self, line: str) -> None:
        with suppress(OSError):  # a full disk may cost lines of the log, but does not end a run
            self._bar.write(log.shown(line))
            sys.stdout.flush()

    def warn(self, kind: str, step: int, line: str, **values: Any) -> None:
        self.record(kind, step, {**values, "message": line})
        self.say(f"step {step}  warning: {line}")

    def training(self, step: int, values: dict[str, Any]) -> None:
        self.record("train", step, values)
        speed = values["images_per_second"]
        self._line.mark(step, time.monotonic())
        words = words_of_pretraining(values, self._heldout_ce)
        lines = self._line.lines(step, words, speed, values["mean_step_seconds"])
        facts = {"loss": values["loss"], "images_per_second": speed, "seconds_left": round(self._line.seconds_left)}
        self._recent = finite(facts)
        for line in lines:
            self.say(line)

    def close(self, state: RunStatus, step: int, line: str, **facts: Any) -> None:
        self.say(line)
        self._bar.close()
        self._metrics.close()
        self._status(state, step, **facts)
        for tracker in self._trackers:
            tracker.close()

    def _status(self, state: RunStatus, step: int, **facts: Any) -> None:
        began = time.monotonic()
        if state == "running":
            facts |= self._recent
        try:
            write_status(self._directory, state, step=step, num_steps=self._num_steps, **facts)
        except OSError as error:  # a full disk does not end a run
            if not self._status_failed:
                self.say(f"warning: {self._directory / STATUS_NAME} cannot be written: {error}")
            self._status_failed = True
        else:
            self._status_failed = False
        ended = time.monotonic()
        self._status_due = ended + max(_STATUS_SECONDS, 50 * (ended - began))  # a slow disk does not slow the run


def peak_memory_bytes() -> int:
    """Returns the most memory that this rank has used so far: resident on the CPU, allocated on a GPU."""
    if distributed.uses_gpu():
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()
