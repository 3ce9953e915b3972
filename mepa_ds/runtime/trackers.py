"""Where numbers go beside metrics.jsonl: Weights & Biases, TensorBoard. Whatever fails there makes one warning."""

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
from mepa_ds.files import write_text

# What is still to be sent at the end of a run takes a while; what a killed process leaves to do does not.
_CLOSE_SECONDS, _KILLED_SECONDS = 60.0, 5.0
_SERVICE = "wandb-core"


class TensorBoard:
    """Scalars for TensorBoard. Its writer is of no use after an error (a full disk): none until a rewind or a start."""

    def __init__(self, directory: Path, step: int):
        self._directory = directory
        self._writer: Any = None
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """TensorBoard shows nothing of later steps that was written before."""
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
        except Exception as error:  # a full disk's comes from its thread's last write, told at the next one
            self._writer = None
            _rests(f"{self._directory} cannot be written ({_in_a_line(error)})")


class Wandb:
    """The Weights & Biases run of an output_dir, the same for every start.

    Its library talks to a process that it starts. A batch system that asks a run to stop sends its signal to that too,
    which then ends. A thread does all of it, so that a process that has died or hangs holds nobody up.
    """

    def __init__(self, config: PretrainConfig):
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._resting = False
        self._library: Any = None
        self._run: Any = None
        self._tasks.put(lambda: self._start(config))
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def add(self, scalars: dict[str, float], step: int) -> None:
        if not self._resting:
            self._tasks.put(lambda: self._run.log({"step": step, **scalars}))

    def rewind(self, step: int) -> None:
        """Nothing: its own counter cannot go back, so `step` is a number like others, and some stand there twice."""

    def close(self) -> None:
        """Returns within a minute or so."""
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
        with suppress(Exception, SystemExit):  # or it would do so when Python ends, and tell of a process that is gone
            if self._library is not None:
                self._library.teardown()

    def _start(self, config: PretrainConfig) -> None:
        if os.environ.get("WANDB_MODE") == "":
            del os.environ["WANDB_MODE"]  # which is what is meant, but the library finds it misspelt
        import wandb

        self._library = wandb
        identifier = config.output_dir / "wandb_id"
        if not identifier.exists():
            write_text(identifier, secrets.token_hex(4))
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=config.log.wandb_project,
            id=identifier.read_text().strip(),
            resume="allow",
            mode=mode,
            dir=str(config.output_dir),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )
        # Its own counter cannot go back, but a resumed run takes some steps again.
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
    """It would live on after the run, with the run's output open: who reads that would wait for ever."""
    with suppress(psutil.Error):
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if child.name() == _SERVICE:
                    child.kill()
