"""What a run leaves on disk besides its records: checkpoints, the best weights, the last weights."""

from __future__ import annotations

import errno
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mepa_ds import distributed
from mepa_ds.checkpoint import files
from mepa_ds.checkpoint.background_writer import BackgroundWriter, Digests, Written
from mepa_ds.checkpoint.progress import progress_noted_by
from mepa_ds.checkpoint.state import RunState, read_state
from mepa_ds.checkpoint.store import EMA, MASTER, Fragment
from mepa_ds.checkpoint.weights import WEIGHTS_FACTS_NAME, convert_fragments, has_weights, step_of_weights
from mepa_ds.engine.checkpoint import Staging, optimizer_facts, restore, stage
from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.errors import UserError
from mepa_ds.files import make_way, remove

BEST = "best"
_VERSIONS_OF = ("mepa_ds", "torch", "deepspeed")


@dataclass(frozen=True)
class Loaded:
    """The state of the checkpoint `path`. `damaged`: a line for each newer checkpoint that could not be used."""

    state: RunState
    path: Path
    damaged: list[str]


@dataclass(frozen=True)
class BestWeights:
    """Weights of a step that are better than those in `best`, and their held-out cross-entropy."""

    step: int
    heldout_ce: float


class RunCheckpoints:
    """Checkpoints and exported weights of the run in `output_dir`. Collective, but for `newest_step`.

    Saving and exporting return when the state is copied aside; a thread writes. What became of it: `ended`. `beat` is
    called while something is waited for that goes on.
    """

    def __init__(
        self,
        engine: PretrainEngine,
        output_dir: Path,
        keep: int,
        keep_every: int | None = None,
        beat: Callable[[], object] = lambda: None,
    ):
        self.directory = output_dir / "checkpoints"
        self._output, self._engine, self._beat = output_dir, engine, beat
        self._keep, self._keep_every = keep, keep_every
        self._staging = Staging()
        self._writer = BackgroundWriter(engine.device, beat)
        self._last = {"last": MASTER} | ({"last_ema": EMA} if EMA in engine.kinds else {})

    def save(self, state: RunState, best: BestWeights | None = None) -> None:
        """Writes `checkpoints/step_<step>`, and deletes old checkpoints.

        `best`: these weights also go to `best`. The checkpoint has their score as its best one if that succeeds;
        `ended` then has an entry of its own for them.
        """
        facts = optimizer_facts(self._engine)
        versions = {name: importlib.metadata.version(name) for name in _VERSIONS_OF}
        state = replace(state, adam_step=facts.adam_step, loss_scaler=facts.loss_scaler, versions=versions)
        target = self.directory / files.checkpoint_name(state.step)
        temporary = _beside(target)
        exported = [False]

        def export_best() -> None:
            weights = _beside(self._output / BEST)
            make_way(weights)
            self._convert(temporary, weights, MASTER, state.step)
            files.publish(weights, self._output / BEST)
            exported[0] = True

        def commit(digests: Digests) -> None:
            assert best is not None or not exported[0]
            written = replace(state, best_heldout_ce=best.heldout_ce) if best is not None and exported[0] else state
            files.complete(temporary, written, digests)
            files.publish(temporary, target)
            files.prune(self.directory, self._keep, self._keep_every)

        before = None if best is None else (BEST, export_best)
        self._writer.submit(target.name, self._stage(self._engine.kinds), temporary, commit, before)

    def export(self, name: str, step: int, kind: str = MASTER) -> None:
        """Writes the fp32 masters, or their average, to `<output_dir>/<name>` as safetensors + config.json."""
        directory = self._output / name
        temporary = _beside(directory)

        def commit(_: Digests) -> None:
            self._convert(temporary, temporary / "weights", kind, step)
            files.publish(temporary / "weights", directory)
            remove(temporary)

        self._writer.submit(name, self._stage((kind,)), temporary, commit)

    def export_last(self, step: int) -> list[Written]:
        """The weights of the last step, unless they are there; returns when everything is on disk, as `settle` does.

        `check_last` says whether they could be written.
        """
        for name, kind in self._last.items():
            if distributed.of_main(step_of_weights(self._output / name)) != step:
                self.export(name, step, kind)
        return self.settle()

    def check_last(self, ended: list[Written]) -> None:
        """Raises UserError, on every rank, when last weights are among what could not be written."""
        for written in ended:
            if written.error is not None and written.what in self._last:  # the same on every rank
                raise UserError(
                    f"{self._output / written.what}: could not be written ({written.error}); "
                    f"{_remedy(written.error)} and start again: the run goes on from its last checkpoint",
                    agreed=True,
                )

    def settle(self) -> list[Written]:
        """Waits for everything that is being written; returns what has ended since the last call."""
        self._writer.wait()
        return self._writer.written()

    def ended(self) -> list[Written]:
        """What has been written, or has failed, since the last call. A failure leaves what was there before."""
        return self._writer.written()

    @property
    def newest_step(self) -> int | None:
        """Of the checkpoints on disk; None: there is none."""
        return next((files.step_of(path) for path in files.list_checkpoints(self.directory)[-1:]), None)

    def has_best(self) -> bool:
        """Whether `best` holds weights, as the main rank sees it."""
        return distributed.of_main(has_weights(self._output / BEST))

    def load_newest(self, check: Callable[[Path, RunState], None]) -> Loaded | None:
        """Restores the newest whole checkpoint, on any number of ranks and at any ep_size; None: there is none.

        Damaged ones are set aside, and the one before them is taken. `check` raises UserError, on every rank, for a
        checkpoint that the recipe cannot go on from.

        Raises:
            UserError: on every rank, when all checkpoints are damaged (which then stay where they are).
        """
        damaged: dict[Path, str] = {}
        for path in reversed(distributed.of_main(files.list_checkpoints(self.directory))):
            look = partial(files.find_damage, path, distributed.rank(), distributed.world_size())
            damage = next((found for found in self._writer.gather(look) if found is not None), None)
            if damage is not None:
                damaged[path] = f"{path} is damaged ({damage})"
                continue
            state = read_state(path)
            check(path, state)
            with progress_noted_by(self._beat):
                restore(self._engine, path, state)
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

    def forget_last_weights_after(self, step: int) -> None:
        """Last weights of later steps, which are taken again, lose their note of the step.

        Other weights of the same number are to replace them, also when this start does not come to that.
        """
        for name in self._last if distributed.is_main() else ():
            if (step_of_weights(self._output / name) or 0) > step:
                (self._output / name / WEIGHTS_FACTS_NAME).unlink()

    def _stage(self, kinds: tuple[str, ...]) -> Callable[[], list[Fragment]]:
        return partial(stage, self._engine, self._staging, kinds)

    def _convert(self, fragments: Path, directory: Path, kind: str, step: int) -> None:
        convert_fragments(fragments, self._engine.objective.transformer.config, directory, kind, step)


def _beside(path: Path) -> Path:
    """Where it is written before it gets its name."""
    return path.with_name(f".{path.name}.tmp")


def _remedy(error: str) -> str:
    full = any(os.strerror(code) in error for code in (errno.ENOSPC, errno.EDQUOT))
    return "make room" if full else "mend that"
