"""What a tokenizer's training writes while it runs: metrics.jsonl, the log, a progress bar, status.json."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from mepa_ds import distributed, log
from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
from mepa_ds.runtime.log_line import LogLine, words_of_tokenizer
from mepa_ds.runtime.metrics import METRICS_NAME, MetricsWriter, finite, read_metrics
from mepa_ds.runtime.status import STATUS_NAME, RunStatus, write_status


class TokenizerRecords:
    """The records of a run. Those of all ranks except the main one accept everything and write nothing.

    `anew` names an event of `step`, from which the run continues, that will be recorded again.
    """

    def __init__(self, config: TokenizerTrainingConfig, step: int, num_steps: int, num_images: int, anew: str | None):
        self._directory, self._num_steps, self._num_images = config.output_dir, num_steps, num_images
        is_main = distributed.is_main()
        path = config.output_dir / METRICS_NAME
        self._writer = MetricsWriter(path, step, anew) if is_main else None
        self._bar: tqdm[Any] = tqdm(
            total=num_steps,
            initial=step,
            desc="tokenizer",
            unit="step",
            disable=None if is_main else True,
            mininterval=1.0,
        )
        self._line = LogLine(num_steps)
        scores = [r.get("psnr") for r in read_metrics(path) if r.get("event") == "heldout"] if is_main else []
        self._heldout_psnr: float | None = scores[-1] if scores and isinstance(scores[-1], float) else None
        self._recent: dict[str, Any] = {}
        """Numbers of the last record, for status.json."""

    def write(self, event: str, step: int, samples: int, record: dict[str, Any]) -> None:
        """Writes a record of the kind `event`; `samples` images have been seen."""
        if self._writer is None:
            return
        self._writer.write({"event": event, "step": step, "samples": samples, **record})
        if event == "heldout":
            self._heldout_psnr = record["psnr"]

    def advance(self, step: int) -> None:
        """Notes that a step is done."""
        self._bar.update()
        self._line.begin(step, time.monotonic())

    def training(self, step: int, samples: int, record: dict[str, Any], step_seconds: float) -> None:
        """Writes the record `train` and its line in the log. `step_seconds`: the mean since the last record."""
        if self._writer is None:
            return
        self.write("train", step, samples, record)
        self._line.mark(step, time.monotonic())
        speed = record["images_per_second"]
        words = words_of_tokenizer({**record, "epoch": samples / self._num_images}, self._heldout_psnr)
        for line in self._line.lines(step, words, speed, step_seconds):
            self.say(line)
        facts = {"loss": record["loss"], "images_per_second": speed, "seconds_left": round(self._line.seconds_left)}
        self._recent = finite(facts)
        self.status("running", step)

    def say(self, line: str) -> None:
        """Prints a line, above the progress bar."""
        if self._writer is not None:
            with suppress(OSError):  # a full disk may cost lines of the log, but does not end a run
                self._bar.write(log.shown(line))
                sys.stdout.flush()

    def status(self, state: RunStatus, step: int, **facts: str) -> None:
        """Writes status.json. A failure does not end the run."""
        if self._writer is None:
            return
        known = self._recent if state == "running" else {}
        try:
            write_status(self._directory, state, step=step, num_steps=self._num_steps, **known, **facts)
        except OSError as error:
            log.note(f"warning: {self._directory / STATUS_NAME} cannot be written: {error}")

    def close(self) -> None:
        """Takes the progress bar away."""
        self._bar.close()
