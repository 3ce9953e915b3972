"""Checkpoints that do not know the topology, and weights that need no DeepSpeed: saved, loaded, exported."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from mepa_ds import distributed
from mepa_ds.checkpoint import files
from mepa_ds.checkpoint.background_writer import BackgroundWriter, Digests, Staging, Written
from mepa_ds.checkpoint.files import RunState
from mepa_ds.checkpoint.store import EMA, MASTER, Fragment, load_fragments, stored_tensors
from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig
from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.engine.fragments import (
    adam_step,
    buffer_fragments,
    loss_scaler_state,
    parameter_fragments,
    set_adam_step,
    set_loss_scaler_state,
)
from mepa_ds.errors import UserError
from mepa_ds.files import make_way, remove

FactT = TypeVar("FactT")


@dataclass(frozen=True)
class Loaded:
    """`damaged`: a line for each newer checkpoint that could not be used."""

    state: RunState
    path: Path
    damaged: list[str]


class Checkpoints:
    """The checkpoints of one run. Saving and exporting return when the state is copied; files appear later."""

    def __init__(self, engine: PretrainEngine, directory: Path, keep: int, keep_every: int | None):
        self.directory = directory
        self._engine, self._keep, self._keep_every = engine, keep, keep_every
        self._staging = Staging()
        self._writer = BackgroundWriter(engine.device)

    def save(
        self,
        state: RunState,
        on_progress: Callable[[], None] = lambda: None,
        best: tuple[Path, float] | None = None,
    ) -> None:
        """Writes `directory/step_<step>` and deletes old checkpoints. Collective.

        `best`: a directory to which these weights are exported as well, and their held-out cross-entropy. It becomes
        the checkpoint's best one if that export succeeds; `written()` then has an entry of the directory's name.
        """
        zero = self._engine.zero
        state = replace(state, adam_step=adam_step(zero), loss_scaler=loss_scaler_state(zero), versions=_versions())
        target = self.directory / files.checkpoint_name(state.step)
        temporary = target.with_name(f".{target.name}.tmp")

        def export_best() -> None:
            assert best is not None
            directory, heldout_ce = best
            beside = directory.with_name(f".{directory.name}.tmp")
            make_way(beside)
            files.convert_fragments(temporary, self._config, beside, MASTER, state.step, self._writer.note_progress)
            files.publish(beside, directory)
            state.best_heldout_ce = heldout_ce

        def commit(digests: Digests) -> None:
            files.complete(temporary, state, digests)
            files.publish(temporary, target)
            files.prune(self.directory, self._keep, self._keep_every)

        before = None if best is None else (best[0].name, export_best)
        stage = partial(self._stage, self._engine.kinds)
        self._writer.submit(target.name, stage, temporary, commit, on_progress, before)

    def export(
        self, directory: Path, step: int, kind: str = MASTER, on_progress: Callable[[], None] = lambda: None
    ) -> None:
        """Writes the model's fp32 masters, or their average, as safetensors + config.json. Collective."""
        temporary = directory.with_name(f".{directory.name}.tmp")

        def commit(_: Digests) -> None:
            weights = temporary / "weights"
            files.convert_fragments(temporary, self._config, weights, kind, step, self._writer.note_progress)
            files.publish(weights, directory)
            remove(temporary)

        self._writer.submit(directory.name, lambda: self._stage((kind,)), temporary, commit, on_progress)

    def wait(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """Returns when everything submitted is on disk, or has failed."""
        self._writer.wait(on_progress)

    def written(self) -> list[Written]:
        """What has been written, or has failed, since the last call."""
        return self._writer.written()

    def _stage(self, kinds: tuple[str, ...]) -> list[Fragment]:
        model = self._engine.objective
        fragments = list(parameter_fragments(model, self._staging.copy(self._engine.flats(kinds))))
        if distributed.is_main():
            fragments += [replace(fragment, data=fragment.data.cpu().clone()) for fragment in buffer_fragments(model)]
        return fragments

    @property
    def _config(self) -> ModelConfig:
        return self._engine.objective.transformer.config

    def load_newest(self, data: dict[str, str], on_progress: Callable[[], None] = lambda: None) -> Loaded | None:
        """Restores the newest whole checkpoint on any number of ranks and any ep_size; None: there is none. Collective.

        Damaged ones are set aside, and the one before them taken. Raises UserError, on every rank, when all are
        damaged (which then stay where they are), or when model or data are not the checkpoint's.
        """
        damaged: dict[Path, str] = {}
        for path in reversed(agreed(files.list_checkpoints(self.directory))):
            look = partial(
                files.find_damage, path, distributed.rank(), distributed.world_size(), self._writer.note_progress
            )
            damage = next((found for found in self._writer.gather(look, on_progress) if found is not None), None)
            if damage is not None:
                damaged[path] = f"{path} is damaged ({damage})"
                continue
            state = files.read_state(path)
            self._check(path, state, data)
            self._restore(path, state, on_progress)
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

    def _check(self, path: Path, state: RunState, data: dict[str, str]) -> None:
        # Keys that are newer than the checkpoint have their defaults there.
        theirs = validate(ModelConfig, dict(state.recipe["model"]), str(path))
        expected, found = (json.loads(config.model_dump_json()) for config in (self._config, theirs))
        changed = [f"model.{line}" for line in _changes(found, expected)]
        alignment = self._engine.objective.config.alignment
        if alignment is not None:  # the projector is no part of the model's config; one that is not needed may go
            hidden = ((state.recipe.get("objective") or {}).get("alignment") or {}).get("projector_hidden")
            if hidden != alignment.projector_hidden:
                key = "objective.alignment.projector_hidden"
                changed.append(f"{key}: {hidden!r} there, {alignment.projector_hidden!r} now")
        if changed:
            raise UserError(
                f"{path}: the checkpoint's model differs from the recipe's ({'; '.join(changed)}); "
                "restore the recipe or choose another output_dir",
                agreed=True,
            )
        if changed := _changes(state.data, data):
            raise UserError(
                f"{path}: the checkpoint was trained on other data ({'; '.join(changed)}), so the run "
                "cannot go on from its place in them; restore the data, or choose another output_dir",
                agreed=True,
            )

    def _restore(self, path: Path, state: RunState, on_progress: Callable[[], None]) -> None:
        engine = self._engine
        has_average = any(name.startswith(f"{EMA}/") for name in stored_tensors(path))
        kinds = [kind for kind in engine.kinds if kind != EMA or has_average]
        fragments = list(parameter_fragments(engine.objective, engine.flats(tuple(kinds))))
        load_fragments([*fragments, *buffer_fragments(engine.objective)], path, on_progress=on_progress)
        set_adam_step(engine.zero, state.adam_step)
        set_loss_scaler_state(engine.zero, state.loss_scaler)
        engine.restored(has_average)


def _changes(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    keys = sorted(theirs.keys() | ours.keys())
    return [
        f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} now" for key in keys if theirs.get(key) != ours.get(key)
    ]


def agreed(mine: FactT) -> FactT:
    """The main rank's: other nodes may see a shared file system later. Collective."""
    shared = [mine]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("mepa_ds", "torch", "deepspeed")}
