"""The model of a run on disk: which of its weights to open, its recipe, its tokenizer and the names of its classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mepa_ds.checkpoint.files import find_damage, is_checkpoint_name, list_checkpoints, step_of
from mepa_ds.checkpoint.state import read_state
from mepa_ds.checkpoint.weights import has_weights, read_weights, step_of_weights
from mepa_ds.config.base import load_config, read_yaml, validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.shards.index import INDEX_NAME, ShardIndex
from mepa_ds.errors import UserError
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.models.transformer_files import with_weights
from mepa_ds.runtime.metrics import METRICS_NAME
from mepa_ds.weights.directories import CONFIG_NAME

CHECKPOINTS, RECIPE_NAME = "checkpoints", "resolved.yaml"
Wanted = Literal["newest", "best"]
_EXPORTS = {"newest": ("last", "best"), "best": ("best", "last")}
_PLACES = ("*", "runs/*")
"""Where runs lie in the directory of a project."""


@dataclass(frozen=True)
class RunModel:
    """A model that can be opened, and as much of the run that made it as is there."""

    source: Path
    """The weights or the checkpoint."""
    run: Path
    """The directory of the run, or the one that holds the weights."""
    recipe: PretrainConfig | None = None
    notes: tuple[str, ...] = ()
    """Lines to say of what is there but cannot be read."""

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that the model is from; None for exported weights."""
        return self.source if is_checkpoint_name(self.source.name) else None

    @property
    def step(self) -> int | None:
        return step_of_weights(self.source) if self.checkpoint is None else step_of(self.checkpoint)

    def open(
        self, scales: Sequence[int] | None = None, *, num_heads: int | None = None, depth: int | None = None
    ) -> NextScaleTransformer:
        """The model in evaluation mode, on the CPU, with its `class_names`. Raises UserError for damaged files."""
        if self.checkpoint is None:
            model = NextScaleTransformer.open(self.source, scales, num_heads=num_heads, depth=depth)
        else:
            assert self.recipe is not None
            if (damage := find_damage(self.checkpoint)) is not None:
                raise UserError(f"{self.checkpoint}: damaged: {damage}; give an older checkpoint, or exported weights")
            config, state = self.recipe.model, read_weights(self.checkpoint, self.recipe.model)
            model = with_weights(lambda: NextScaleTransformer(config), state, str(self.checkpoint))
            model.class_names = tuple(read_state(self.checkpoint).class_names)
        model.class_names = model.class_names or self.names_of_data()
        return model

    def tokenizer(self, given: Path | None = None) -> Path:
        """The tokenizer's path: `given`, or the recipe's. Raises UserError where neither is there."""
        if given is not None:
            return given
        if self.recipe is None:
            raise UserError(
                f"--tokenizer: {self.source} does not tell its tokenizer; give its directory, or VAR's file"
            )
        path = self.located(self.recipe.tokenizer)
        if not path.exists():
            raise UserError(
                f"--tokenizer: {path}, which the run names, is not there; start in the directory where the run was "
                "started, or give it"
            )
        return path

    def located(self, path: Path) -> Path:
        """A path of the recipe: from where the run was started, else from here, else from a directory above the run.

        In this order: another project's tokenizer may stand under the same relative path in the working directory.
        """
        if path.is_absolute():
            return path
        places = [*self._started_in(), Path(), *self.run.resolve().parents]
        return next((place / path for place in places if (place / path).exists()), path)

    def _started_in(self) -> list[Path]:
        """The directory of the run's start, where output_dir, relative to it, still leads to the run."""
        written = Path(os.path.normpath(self.recipe.output_dir)) if self.recipe else Path()
        run = Path(os.path.abspath(self.run))
        if written.is_absolute() or run.parts[-len(written.parts) :] != written.parts:
            return []
        start = Path(*run.parts[: -len(written.parts)])
        return [] if start == Path.cwd() else [start]

    def data_of_names(self) -> Path | None:
        """The set of the recipe that names the classes."""
        path = self.recipe and (self.recipe.data.tokens or self.recipe.data.images)
        return self.located(path) if path else None

    def names_of_data(self) -> tuple[str, ...]:
        """Names of the classes, for weights of earlier versions, which do not have them.

        Empty for weights from elsewhere, and for data without names or that are not there any more: names are for
        people, and the model does without them.
        """
        data = self.data_of_names()
        try:
            return ShardIndex.read(data).classes if data is not None and (data / INDEX_NAME).exists() else ()
        except (UserError, OSError):
            return ()


def find_model(path: Path, wanted: Wanted = "newest") -> RunModel:
    """Finds the model of a run, of a project with one run, a checkpoint, or weights.

    Args:
        wanted: of a run, the newest checkpoint and else exported weights (`newest`), or its best weights, else the
            last ones, else the newest checkpoint (`best`).

    Raises:
        UserError: there is nothing of the kind, or a project has several runs.
    """
    if path.is_dir() and is_checkpoint_name(path.name):
        source, run = path, path.parent.parent
    elif _is_run(path):
        source, run = _of_run(path, wanted), path
    elif path.is_dir() and not (path / CONFIG_NAME).exists() and (found := _run_within(path)) is not None:
        source, run = _of_run(found, wanted), found
    else:
        source, run = path, path.parent
    recipe, notes = _recipe(run, source if is_checkpoint_name(source.name) else None)
    return RunModel(source, run, recipe, notes)


def find_chosen(run: Path | None, weights: Path | None) -> RunModel:
    """Finds what `--run` or `--weights` names, one of them: of a run, its best weights. Raises as `find_model`."""
    path = weights if run is None else find_run(run)
    assert path is not None
    return find_model(path, "best")


def find_run(path: Path) -> Path:
    """The directory of a pretraining run: `path` itself, or the one in the project at `path`.

    Raises:
        UserError: there is none, or there are several.
    """
    found = path if _is_run(path) else _run_within(path)
    if found is None:
        kind = "a directory without a run" if path.is_dir() else "not there"
        raise UserError(f"--run: {path} is {kind}; give the output_dir of a pretraining run, or the project around it")
    return found


def _is_run(path: Path) -> bool:
    return (path / METRICS_NAME).exists() or (path / CHECKPOINTS).is_dir()


def _run_within(project: Path) -> Path | None:
    """Raises UserError for several, with their names."""
    runs = [path for place in _PLACES for path in sorted(project.glob(place)) if _is_run(path) and _pretrains(path)]
    if len(runs) > 1:
        listed = ", ".join(map(str, runs[:5])) + (", ..." if len(runs) > 5 else "")
        raise UserError(f"{project}: has {len(runs)} runs; give one of them: {listed}")
    return runs[0] if runs else None


def _pretrains(run: Path) -> bool:
    """Whether a run is one of pretraining: the training of a tokenizer leaves the same kinds of files.

    A pretraining recipe names its tokenizer by a path; `tokenizer` in a tokenizer's recipe is the section of its sizes.
    """
    try:
        return isinstance(read_yaml(run / RECIPE_NAME).get("tokenizer"), str)
    except UserError:
        return False


def _of_run(run: Path, wanted: Wanted) -> Path:
    checkpoints = list_checkpoints(run / CHECKPOINTS)
    exported = [run / name for name in _EXPORTS[wanted] if has_weights(run / name)]
    in_order = [*checkpoints[-1:], *exported] if wanted == "newest" else [*exported, *checkpoints[-1:]]
    if in_order:
        return in_order[0]
    if (run / CONFIG_NAME).exists():
        return run  # weights of another kind: opening them says so
    raise UserError(f"{run}: a run without a checkpoint or exported weights; wait for its first checkpoint")


def _recipe(run: Path, checkpoint: Path | None) -> tuple[PretrainConfig | None, tuple[str, ...]]:
    """The recipe that the weights are from, and a line where one is there but cannot be read."""
    if checkpoint is not None:
        return validate(PretrainConfig, read_state(checkpoint).recipe, str(checkpoint)), ()
    if not (run / RECIPE_NAME).is_file():
        return None, ()
    try:
        return load_config(PretrainConfig, run / RECIPE_NAME), ()
    except UserError as error:  # of a tokenizer's training, or of another version
        said = " ".join(str(error).split())
        return None, (f"the run of {run}: its recipe is not of pretraining here ({said})",)
