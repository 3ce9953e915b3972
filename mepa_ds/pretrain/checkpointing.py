"""What a run writes to disk besides its records: checkpoints, the best weights and the last weights."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mepa_ds import distributed
from mepa_ds.checkpoint import files
from mepa_ds.checkpoint.background_writer import BackgroundWriter, Digests, Written
from mepa_ds.checkpoint.fragment import EMA, MASTER, Fragment
from mepa_ds.checkpoint.ownership import clear, discard
from mepa_ds.checkpoint.progress import progress_noted_by
from mepa_ds.checkpoint.state import RunState, read_state, versions
from mepa_ds.checkpoint.weights import WEIGHTS_FACTS_NAME, convert_fragments, has_weights, step_of_weights
from mepa_ds.engine.checkpoint import Staging, optimizer_facts, restore, stage
from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.errors import UserError

BEST = "best"


@dataclass(frozen=True)
class Loaded:
    """The state of the checkpoint `path`. `damaged` has a line for each newer checkpoint that could not be used."""

    state: RunState
    path: Path
    damaged: list[str]


@dataclass(frozen=True)
class BestWeights:
    """The step whose weights are better than the weights in `best`, and their held-out cross-entropy."""

    step: int
    heldout_ce: float


@dataclass(frozen=True)
class Kept:
    """Which checkpoints stay on disk."""

    newest: int
    every: int | None = None
    """Those of every such step, for good."""
    steps: tuple[int, ...] = ()
    """Those of these steps, for good."""


class RunCheckpoints:
    """Checkpoints and exported weights of the run in `output_dir`. Collective, except for `newest_step`.

    Saving and exporting return when the state is copied aside; a thread then writes it, and `ended` returns the result.
    `beat` is called while this rank waits for work that makes progress.
    """

    def __init__(
        self,
        engine: PretrainEngine,
        output_dir: Path,
        kept: Kept,
        beat: Callable[[], object] = lambda: None,
    ):
        self.directory = output_dir / "checkpoints"
        self._output, self._engine, self._beat = output_dir, engine, beat
        self._kept = kept
        self._staging = Staging()
        self._writer = BackgroundWriter(engine.device, beat)
        self._last = {"last": MASTER} | ({"last_ema": EMA} if EMA in engine.kinds else {})

    def save(self, state: RunState, best: BestWeights | None = None) -> None:
        """Writes `checkpoints/step_<step>`, and deletes old checkpoints.

        If `best` is given, the weights are also exported to `best`. If that succeeds, the checkpoint stores their score
        as the best one. `ended` has a separate entry for this export.
        """
        names = list(self._engine.objective.transformer.class_names)
        state = replace(state, **optimizer_facts(self._engine), class_names=names, versions=versions())
        target = self.directory / files.checkpoint_name(state.step)
        temporary = _beside(target)

        def export_best() -> None:
            nonlocal state
            assert best is not None
            weights = _beside(self._output / BEST)
            clear(weights)
            self._convert(temporary, weights, MASTER, state.step)
            files.publish(weights, self._output / BEST)
            state = replace(state, best_heldout_ce=best.heldout_ce)

        def commit(digests: Digests) -> None:
            files.complete(temporary, state, digests)
            files.publish(temporary, target)
            files.prune(self.directory, self._kept.newest, self._kept.every, self._kept.steps)

        before = None if best is None else (BEST, export_best)
        self._writer.submit(target.name, self._stage(self._engine.kinds), temporary, commit, before)

    def export(self, name: str, step: int, kind: str = MASTER) -> None:
        """Writes the fp32 masters, or their average, to `<output_dir>/<name>` as safetensors + config.json."""
        directory = self._output / name
        temporary = _beside(directory)

        def commit(_: Digests) -> None:
            self._convert(temporary, temporary / "weights", kind, step)
            files.publish(temporary / "weights", directory)
            discard(temporary)

        self._writer.submit(name, self._stage((kind,)), temporary, commit)

    def export_last(self, step: int) -> list[Written]:
        """Exports the weights of the last step unless they exist; waits for the disk and returns as `settle` does.

        `check_last` says whether the weights could be written.
        """
        for name, kind in self._last.items():
            if distributed.of_main(step_of_weights(self._output / name)) != step:
                self.export(name, step, kind)
        return self.settle()

    def check_last(self, ended: list[Written]) -> None:
        """Raises UserError, on every rank, when the last weights could not be written."""
        for written in ended:
            if written.error is not None and written.what in self._last:  # the same on every rank
                raise UserError(
                    f"{self._output / written.what}: could not be written ({written.error}); "
                    f"{_remedy(written.error)} and start again: the run goes on from its last checkpoint",
                    agreed=True,
                )

    def settle(self) -> list[Written]:
        """Waits for everything that is being written; returns the tasks that have ended since the last call."""
        self._writer.wait()
        return self._writer.written()

    def ended(self) -> list[Written]:
        """Returns the tasks that succeeded or failed since the last call. A failure leaves earlier files in place."""
        return self._writer.written()

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint on disk; None if there is no checkpoint."""
        return next((files.step_of(path) for path in files.list_checkpoints(self.directory)[-1:]), None)

    def has_best(self) -> bool:
        """Returns whether the main rank sees weights in `best`."""
        return distributed.of_main(has_weights(self._output / BEST))

    def load_newest(self, check: Callable[[Path, RunState], None]) -> Loaded | None:
        """Restores the newest whole checkpoint, on any number of ranks and at any ep_size; None if there is none.

        Damaged checkpoints are set aside, and the one before them is used. `check` raises UserError, on every rank, for
        a checkpoint from which the recipe cannot continue.

        Raises:
            UserError: on every rank, when all checkpoints are damaged (they then stay where they are).
        """
        damaged: dict[Path, str] = {}
        seen = distributed.of_main([path.name for path in files.list_checkpoints(self.directory)])
        for path in (self.directory / name for name in reversed(seen)):
            damage = self._find_damage(path)
            if damage is not None:
                damaged[path] = f"{path} is damaged ({damage})"
                continue
            state = read_state(path)
            check(path, state)
            self._restore(path, state)
            if distributed.is_main():
                for unusable in damaged:
                    files.set_aside(unusable)
            lines = [f"{line}: set aside, the one before it is used" for line in damaged.values()]
            return Loaded(state, path, lines)
        if damaged:
            raise UserError(
                f"{self.directory}: every checkpoint is damaged ({'; '.join(damaged.values())}); "
                "restore one from a backup, or choose another output_dir to start anew",
                agreed=True,
            )
        return None

    def load_foreign(self, path: Path, state: RunState) -> Loaded:
        """Restores a checkpoint of another run, to go on from its `state`. The checkpoint is left as it is.

        Raises UserError, on every rank, when it is damaged.
        """
        damage = self._find_damage(path)
        if damage is not None:
            raise UserError(
                f"branch_from: {path} is damaged ({damage}); name another checkpoint of that run, or restore this one",
                agreed=True,
            )
        self._restore(path, state)
        return Loaded(state, path, [])

    def _find_damage(self, path: Path) -> str | None:
        """Returns what is wrong with the files of a checkpoint, or None: the same on every rank."""
        look = partial(files.find_damage, path, distributed.rank(), distributed.world_size())
        return next((found for found in self._writer.gather(look) if found is not None), None)

    def _restore(self, path: Path, state: RunState) -> None:
        with progress_noted_by(self._beat):
            restore(self._engine, path, state)

    def forget_last_weights_after(self, step: int) -> None:
        """Removes the note of the step from last weights of later steps, because those steps are trained again.

        Without the note, new weights of the same step replace the old ones, even if only a later start exports them.
        """
        for name in self._last if distributed.is_main() else ():
            if (step_of_weights(self._output / name) or 0) > step:
                (self._output / name / WEIGHTS_FACTS_NAME).unlink()

    def _stage(self, kinds: tuple[str, ...]) -> Callable[[], list[Fragment]]:
        return partial(stage, self._engine, self._staging, kinds)

    def _convert(self, fragments: Path, directory: Path, kind: str, step: int) -> None:
        transformer = self._engine.objective.transformer
        convert_fragments(fragments, transformer.config, directory, kind, step, transformer.class_names)


def _beside(path: Path) -> Path:
    """Returns the temporary path at which `path` is written before it gets its name."""
    return path.with_name(f".{path.name}.tmp")


def _remedy(error: str) -> str:
    full = any(os.strerror(code) in error for code in (errno.ENOSPC, errno.EDQUOT))
    return "make room" if full else "mend that"
