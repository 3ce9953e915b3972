"""What a run leaves on disk besides its records: checkpoints, the best weights and the last ones."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from mepa_ds import distributed, log
from mepa_ds.checkpoint.background_writer import Written
from mepa_ds.checkpoint.files import (
    WEIGHTS_FACTS_NAME,
    RunState,
    has_weights,
    list_checkpoints,
    step_of,
    step_of_weights,
)
from mepa_ds.checkpoint.store import EMA, MASTER
from mepa_ds.config.pretrain import PretrainConfig, PretrainTrainConfig
from mepa_ds.engine.checkpoint import Checkpoints, Loaded, agreed
from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.errors import UserError
from mepa_ds.runtime.recorder import Recorder


class RunSaver:
    """Made on every rank; all but `last_step_saved` is collective."""

    def __init__(self, config: PretrainConfig, engine: PretrainEngine, on_progress: Callable[[], None]):
        self._output, self._train, self._on_progress = config.output_dir, config.train, on_progress
        directory, keep = config.output_dir / "checkpoints", config.log.keep_checkpoints
        self._checkpoints = Checkpoints(engine, directory, keep, config.log.keep_every)
        self._evaluates = config.data.heldout_tokens is not None
        self._last = {"last": MASTER} | ({"last_ema": EMA} if config.optim.ema else {})
        self._best: tuple[int, float] | None = None
        """Step and held-out cross-entropy of weights that are better than those in `best`, and not yet there."""
        self.recorder: Recorder | None = None
        """The main rank's, as soon as there is one."""

    def load_newest(self, data: dict[str, str]) -> Loaded | None:
        """Restores the newest whole checkpoint; None: there is none.

        Last weights of later steps, which are taken again, lose their note of the step: other weights of the same
        number are to replace them, also when this start does not come to that.
        """
        loaded = self._checkpoints.load_newest(data, self._on_progress)
        if loaded is not None:
            _check_length(self._train, loaded)
            self._look_for_best(loaded.state)
        step = 0 if loaded is None else loaded.state.step
        for name in self._last if distributed.is_main() else ():
            if (step_of_weights(self._output / name) or 0) > step:
                (self._output / name / WEIGHTS_FACTS_NAME).unlink()
        return loaded

    def _look_for_best(self, state: RunState) -> None:
        """Best weights that are not there (only checkpoints were copied, or `best` was removed) are looked for anew.

        The next evaluation's are the best then; that is this start's first one where the checkpoint's step was
        evaluated. Collective.
        """
        best = self._output / "best"
        if state.best_heldout_ce == float("inf") or agreed(has_weights(best)):
            return
        if distributed.is_main():
            remedy = "the next evaluation's weights go there, though earlier ones may have been better"
            if not self._evaluates:
                remedy = "data.heldout_tokens is not set, so none will come; mepa export writes a checkpoint's weights"
            log.note(f"warning: {best}: no weights there, though this run had evaluated some as its best: {remedy}")
        state.best_heldout_ce, state.evaluated_step = float("inf"), 0

    def save(self, state: RunState) -> None:
        """A checkpoint of this step; its weights also to <output_dir>/best, if they were found to be the best."""
        best = None
        if self._best is not None and self._best[0] == state.step:
            best = (self._output / "best", self._best[1])
        else:
            self.settle_best(state)
        if self.recorder:
            state.metrics_records = self.recorder.num_records
        self._checkpoints.save(state, self._on_progress, best)

    def note_best(self, step: int, heldout_ce: float) -> None:
        """The weights of `step` are the best so far: `save` or `export_best` are to write them."""
        self._best = (step, heldout_ce)

    def export_best(self, state: RunState) -> None:
        """Weights that this step's evaluation found to be the best go to <output_dir>/best."""
        if self._best is not None and self._best[0] == state.step:
            self._checkpoints.export(self._output / "best", state.step, on_progress=self._on_progress)

    def settle_best(self, state: RunState) -> None:
        """All ranks know whether an earlier export of the best weights has succeeded."""
        if self._best is not None:
            self.settle(state)

    def settle(self, state: RunState) -> list[Written]:
        """Waits for what is being written, and reports it."""
        self._checkpoints.wait(self._on_progress)
        return self.report(state)

    def report(self, state: RunState) -> list[Written]:
        """What became of checkpoints and exports. A failed one does not end the run: there will be another."""
        ended = self._checkpoints.written()
        for written in ended:
            if written.what == "best" and self._best is not None:
                if written.error is None:
                    state.best_heldout_ce = self._best[1]
                self._best = None
        for written in ended if self.recorder else []:
            assert self.recorder is not None
            seconds = {"stalled_seconds": written.stalled_seconds, "write_seconds": written.write_seconds}
            if written.error is None:
                self.recorder.record("written", state.step, {"what": written.what, **seconds})
            else:
                line = f"{written.what} could not be written ({written.error}); what was there before is kept"
                self.recorder.warn("write_failed", state.step, line, what=written.what, **seconds)
        return ended

    def export_last(self, state: RunState) -> None:
        """The weights of the last step, unless they are there.

        Raises UserError, on every rank, when they cannot be written.
        """
        for name, kind in self._last.items():
            directory = self._output / name
            if agreed(step_of_weights(directory)) != state.step:
                self._checkpoints.export(directory, state.step, kind, self._on_progress)
        for written in self.settle(state):
            if written.error is not None and written.what in self._last:  # the same on every rank
                raise UserError(
                    f"{self._output / written.what}: could not be written ({written.error}); "
                    f"{_remedy(written.error)} and start again: the run goes on from its last checkpoint",
                    agreed=True,
                )

    @property
    def last_step_saved(self) -> int | None:
        """The newest checkpoint's."""
        return next((step_of(path) for path in list_checkpoints(self._checkpoints.directory)[-1:]), None)


def _remedy(error: str) -> str:
    full = any(os.strerror(code) in error for code in (errno.ENOSPC, errno.EDQUOT))
    return "make room" if full else "mend that"


def _check_length(train: PretrainTrainConfig, loaded: Loaded) -> None:
    """Raises UserError, on every rank, when the length of a half-finished run would be another one."""
    theirs = loaded.state.recipe["train"]["global_batch"]
    if train.steps is None and theirs != train.global_batch:
        raise UserError(
            f"train.global_batch: {theirs} in {loaded.path}, {train.global_batch} now: a length in epochs or samples "
            "has another number of steps then, and some are done already; restore it, or give train.steps",
            agreed=True,
        )
