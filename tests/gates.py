"""Gates: a run waits at a place that a test has chosen, so that a fault comes there however busy the machine is.

The test closes a gate before the run starts, waits until its ranks have come there, does what it wants to do, and opens
it. In each rank `install` or `install_in_tokenizer_training` puts them in: as `prepare` of tests.ranks.Ranks,
or by this module as a program, `python -m tests.gates FOLDER PROGRAM [ARGUMENT ...]`, which runs PROGRAM with them.

Places are `step_7` (step 7, counted from 1, is about to be computed), `writing_step_00000007` (that checkpoint's
tensors are written, but it has not got its name) and `evaluating_7` (a batch of the evaluation after step 7 is next).
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.01


class Gates:
    """The test's side. On a busy machine a run takes minutes to start: `patience`, in seconds."""

    def __init__(self, folder: Path, *places: str, patience: float = 240.0):
        self.folder, self.patience = folder, patience
        folder.mkdir(parents=True, exist_ok=True)
        for place in places:
            self.close(place)

    def close(self, place: str) -> None:
        for trace in self.folder.glob(f"{place}.rank*"):  # of an earlier start
            trace.unlink()
        (self.folder / f"{place}.closed").touch()

    def open(self, place: str) -> None:
        """For good: a later start, too, passes without waiting."""
        (self.folder / f"{place}.closed").unlink()

    def wait(self, place: str, ranks: int = 1, alive: Callable[[], object] = lambda: None) -> None:
        """Until so many ranks stand there. `alive` is called meanwhile; it raises when nobody can come any more."""
        self._wait_for(f"{place}.rank*", ranks, alive)

    def wait_noted(self, rank: int) -> None:
        """Until a rank that stands at a gate has noted that it was asked to stop: it will say so after this step."""
        self._wait_for(f"noted.rank{rank}", 1, lambda: None)
        (self.folder / f"noted.rank{rank}").unlink()

    def _wait_for(self, pattern: str, count: int, alive: Callable[[], object]) -> None:
        end = time.monotonic() + self.patience
        while len(list(self.folder.glob(pattern))) < count:
            alive()
            assert time.monotonic() < end, f"{pattern} has not come"
            time.sleep(_POLL_SECONDS)


_requests: list[Any] = []


def stop_at(folder: Path, place: str) -> None:
    """The run's side: waits while the gate is closed."""
    closed, rank = folder / f"{place}.closed", os.environ.get("RANK", "0")
    if closed.exists():
        (folder / f"{place}.rank{rank}").touch()
    noted = False
    while closed.exists():
        time.sleep(_POLL_SECONDS)
        if not noted and any(requests.reason is not None for requests in _requests):
            (folder / f"noted.rank{rank}").touch()
            noted = True


def install(folder: Path) -> None:
    """Gates of a pretraining run, in this process."""
    from mepa_ds.checkpoint import store
    from mepa_ds.pretrain import trainer as pretraining
    from mepa_ds.pretrain.inputs import InputMaker

    rate, save, evaluation = pretraining.learning_rate, store.save_fragments, InputMaker.evaluation
    begun = [0]

    def learning_rate(config: Any, global_batch: int, step: int, num_steps: int) -> float:
        """A step asks for its rate once, before it is computed, and when all ranks know whether one wants to stop."""
        begun[0] = step + 1
        stop_at(folder, f"step_{step + 1}")
        return rate(config, global_batch, step, num_steps)

    def save_fragments(fragments: Any, directory: Path, *others: Any) -> None:
        save(fragments, directory, *others)
        stop_at(folder, f"writing_{directory.name.strip('.').removesuffix('.tmp')}")

    def evaluate(maker: InputMaker, *arguments: Any) -> Any:
        stop_at(folder, f"evaluating_{begun[0]}")
        return evaluation(maker, *arguments)

    pretraining.learning_rate = learning_rate
    store.save_fragments = save_fragments  # type: ignore[assignment, method-assign]
    InputMaker.evaluation = evaluate  # type: ignore[assignment, method-assign]
    _note_requests()


def install_in_tokenizer_training(folder: Path) -> None:
    """The same for a tokenizer's training; it has steps only."""
    from mepa_ds.train_tokenizer.trainer import TokenizerTrainer

    step = TokenizerTrainer.step

    def gated(trainer: TokenizerTrainer, batches: Any) -> None:
        stop_at(folder, f"step_{trainer.step_index + 1}")
        step(trainer, batches)

    TokenizerTrainer.step = gated  # type: ignore[assignment, method-assign]
    _note_requests()


def _note_requests() -> None:
    from mepa_ds.runtime.stopping import StopRequests

    made = StopRequests.__init__

    def init(requests: StopRequests) -> None:
        made(requests)
        _requests.append(requests)

    StopRequests.__init__ = init  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    install(Path(sys.argv.pop(0)))
    runpy.run_path(sys.argv[0], run_name="__main__")
