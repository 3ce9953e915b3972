"""Writes a run's numbers: first to metrics.jsonl, then to the log, a progress bar, wandb and TensorBoard."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from mepa_ds import distributed
from mepa_ds.files import write_json
from mepa_ds.machine import peak_resident_bytes
from mepa_ds.runtime.metrics import METRICS_NAME, MetricsWriter, finite, read_metrics
from mepa_ds.runtime.trackers import TensorBoard, Wandb

_STATUS_SECONDS = 1.0
RunStatus = Literal["running", "requeue", "finished", "failed", "diverged"]


def write_status(output_dir: Path, state: RunStatus, **facts: Any) -> None:
    """Writes the state of the run to `<output_dir>/status.json`, for launchers that hide exit codes (torchrun)."""
    write_json(output_dir / "status.json", {"state": state, **facts})


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
        self, output_dir: Path, step: int, num_steps: int, num_kept: int, trackers: Sequence[Wandb | TensorBoard] = ()
    ):
        self._directory = output_dir
        self._path = output_dir / METRICS_NAME
        self._bar = tqdm(total=num_steps, initial=step, desc="pretraining", unit="step", disable=None)
        self._num_steps = num_steps
        self._recent: dict[str, Any] = {}
        """Numbers of the last record, for status.json."""
        self._status_due, self._status_failed = 0.0, False
        self._metrics = MetricsWriter(self._path, resume_step=None)
        self.num_records = self._metrics.rewind(num_kept, keep_warnings=False)
        self._status("running", step)
        self._trackers = trackers

    def rewind(self, step: int, num_kept: int) -> None:
        self.num_records = self._metrics.rewind(num_kept, keep_warnings=True)
        for tracker in self._trackers:
            tracker.rewind(step)
        self._bar.n = step
        self._bar.refresh()

    def past_losses(self) -> list[float]:
        losses = [r.get("step_loss", r["loss"]) for r in read_metrics(self._path) if r["event"] == "train"]
        return [loss for loss in losses if isinstance(loss, float)]

    def advance(self, step: int) -> None:
        self._bar.update()
        if time.monotonic() >= self._status_due:
            self._status("running", step)

    def record(self, event: str, step: int, values: dict[str, Any]) -> None:
        self._metrics.write({"event": event, "step": step, **values})
        self.num_records += 1
        scalars = {f"{event}/{key}": value for key, value in _scalars(values)}
        for tracker in self._trackers:
            tracker.add(scalars, step)

    def say(self, line: str) -> None:
        with suppress(OSError):  # a full disk may cost lines of the log, but does not end a run
            self._bar.write(line)
            sys.stdout.flush()

    def warn(self, kind: str, step: int, line: str, **values: Any) -> None:
        self.record(kind, step, {**values, "message": line})
        self.say(f"step {step}  warning: {line}")

    def training(self, step: int, values: dict[str, Any]) -> None:
        self.record("train", step, values)
        left = (self._num_steps - step) * values["mean_step_seconds"]
        facts = {"loss": values["loss"], "images_per_second": values["images_per_second"], "seconds_left": round(left)}
        self._recent = finite(facts)
        text = (
            f"step {step}/{self._num_steps}  loss {values['loss']:.4f}  ce {values['ce']:.4f}  "
            f"lr {values['lr']:.2e}  norm {values['grad_norm']:.2f}  {values['images_per_second']:.0f} images/s  "
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )
        self.say(text)

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
                self.say(f"warning: {self._directory / 'status.json'} cannot be written: {error}")
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


def _scalars(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields numbers by name. A list gives an entry per element: `ce_scale` of 3 scales is ce_scale/1 .. ce_scale/3."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            yield from _scalars({str(index): item for index, item in enumerate(value, start=1)}, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            yield prefix + key, value
