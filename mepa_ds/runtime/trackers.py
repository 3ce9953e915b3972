"""Sends numbers to Weights & Biases and TensorBoard, beside metrics.jsonl. A tracker that fails gives one warning."""

from __future__ import annotations

import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from mepa_ds import log
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.files import write_text

# Sending the rest of the numbers at the end of a run takes a while. Once the service is killed, little is left to do.
_CLOSE_SECONDS, _KILLED_SECONDS = 60.0, 5.0
_SERVICE = "wandb-core"


def open_trackers(config: PretrainConfig, step: int) -> list[Wandb | TensorBoard]:
    """Opens the trackers that the recipe names, at a step of the run."""
    trackers: list[Wandb | TensorBoard] = []
    if config.log.wandb_project:
        trackers.append(Wandb(config.log.wandb_project, config.output_dir, config.model_dump(mode="json")))
    if config.log.tensorboard:
        trackers.append(TensorBoard(config.output_dir / "tensorboard", step))
    return trackers


def check_packages(tensorboard: bool) -> None:
    """Raises UserError when the recipe asks for TensorBoard and its package is not installed."""
    if tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError("log.tensorboard: needs the tensorboard package; run: pip install tensorboard") from error
        except Exception:  # an error in its own imports; the run warns and continues without it
            return


class TensorBoard:
    """Writes scalars for TensorBoard.

    After an error (a full disk) its writer is of no use, so there is no writer until the next rewind or start.
    """

    def __init__(self, directory: Path, step: int):
        self._directory = directory
        self._writer: Any = None
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Opens a new writer, which makes TensorBoard hide earlier numbers of steps after `step`."""
        self.close()
        with self._giving_up():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._directory), purge_step=step + 1)

    def add(self, scalars: dict[str, float], step: int) -> None:
        if self._writer is not None:
            with self._giving_up():
                for key, value in scalars.items():
                    self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        if self._writer is not None:
            with self._giving_up():
                self._writer.close()
        self._writer = None

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # its thread fails to write to a full disk, and the next call raises the error
            self._writer = None
            _rests(f"{self._directory} cannot be written ({_in_a_line(error)})")


class Wandb:
    """The Weights & Biases run of an output_dir, which is the same for every start.

    The library starts a service process and talks to it. A batch system that asks a run to stop sends its signal to the
    service too, which ends it. A thread makes all calls, so that a dead or hanging service does not hold up the run.
    """

    def __init__(self, project: str, output_dir: Path, recipe: dict[str, Any]):
        self._project, self._output_dir, self._recipe = project, output_dir, recipe
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._resting = False
        self._library: Any = None
        self._run: Any = None
        self._tasks.put(self._start)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def add(self, scalars: dict[str, float], step: int) -> None:
        if not self._resting:
            self._tasks.put(lambda: self._run.log({"step": step, **scalars}))

    def rewind(self, step: int) -> None:
        """Does nothing: the counter of wandb cannot go back. `step` is logged as a number; some steps appear twice."""

    def close(self) -> None:
        """Waits until all is sent, for about a minute at most."""
        self._tasks.put(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._rest(f"has not finished within {_CLOSE_SECONDS:.0f} seconds")
            _kill_service()
            self._thread.join(_KILLED_SECONDS)

    def _work(self) -> None:
        try:
            while (task := self._tasks.get()) is not None:
                task()
            self._run.finish()
        except (Exception, SystemExit) as error:
            self._rest(f"fails ({_in_a_line(error)})")
        with suppress(Exception, SystemExit):  # or it would run when Python ends, and complain of a dead service
            if self._library is not None:
                self._library.teardown()

    def _start(self) -> None:
        if os.environ.get("WANDB_MODE") == "":
            del os.environ["WANDB_MODE"]  # empty means unset, but the library rejects it
        import wandb

        self._library = wandb
        identifier = self._output_dir / "wandb_id"
        if not identifier.exists():
            write_text(identifier, secrets.token_hex(4))
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=self._project,
            id=identifier.read_text().strip(),
            resume="allow",
            mode=mode,
            dir=str(self._output_dir),
            config=self._recipe,
            settings=wandb.Settings(console="off", silent=True),
        )
        # The counter of wandb cannot go back, but a resumed run trains some steps again.
        self._run.define_metric("*", step_metric="step")
        if mode == "online" and self._run.url:
            log.note(f"wandb: {self._run.url}")

    def _rest(self, what: str) -> None:
        if not self._resting:
            self._resting = True
            _rests(f"log.wandb_project: Weights & Biases {what}")


def _rests(what: str) -> None:
    log.note(f"warning: {what}; metrics.jsonl has all numbers")


def _in_a_line(error: BaseException) -> str:
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:300]


def _kill_service() -> None:
    """Kills the service. It would outlive the run and keep its output open, so that readers would wait for ever."""
    with suppress(psutil.Error):
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if child.name() == _SERVICE:
                    child.kill()
