"""What is inspected: the model and its tokenizer, and as much of the run that made it as is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mepa_ds.checkpoint.files import find_damage, is_checkpoint_name, list_checkpoints, step_of
from mepa_ds.checkpoint.state import read_state
from mepa_ds.checkpoint.weights import has_weights, read_weights, step_of_weights
from mepa_ds.config.base import load_config, validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.shards.index import INDEX_NAME, ShardIndex
from mepa_ds.errors import UserError
from mepa_ds.files import write_json
from mepa_ds.generation.class_names import RECIPE_NAME, caption
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.models.transformer_files import with_weights
from mepa_ds.tokenizer.tokenizer import Tokenizer
from mepa_ds.weights.directories import CONFIG_NAME

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class Picture:
    """A file of pictures, and what a reader needs to know of it."""

    path: Path
    shows: str
    data: Path | None = None
    """The numbers that were drawn."""


Drawn = list[Picture] | str
"""Pictures, or one line that says why there are none."""


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode with its tokenizer, both on `device`."""

    model: NextScaleTransformer
    tokenizer: Tokenizer
    device: torch.device
    source: Path
    """The weights or the checkpoint that the model is from."""
    class_names: tuple[str, ...] = ()
    run: Path | None = None
    """The directory of the run that made it, where that is known."""
    recipe: PretrainConfig | None = None
    checkpoint: Path | None = None
    """The checkpoint that the model is from; None for exported weights, which have no projector."""
    step: int | None = None

    def caption(self, label: int) -> str:
        return caption(label, self.class_names)

    @property
    def blocks(self) -> list[int]:
        """The MoE blocks."""
        config = self.model.config
        return [index for index in range(config.depth) if config.is_moe_block(index)] if config.moe else []

    @property
    def facts(self) -> dict[str, Any]:
        return {"source": str(self.source), "step": self.step, "tokenizer": self.tokenizer.identity}


def open_subject(
    path: Path, tokenizer: Path | None, scales: Sequence[int] | None, device: torch.device
) -> tuple[Subject, list[str]]:
    """Opens a run (its newest checkpoint, or else its exported weights), a checkpoint, or weights; and lines to say.

    Raises:
        UserError: there is nothing of the kind, it is damaged, or no tokenizer is known.
    """
    if path.is_dir() and is_checkpoint_name(path.name):
        source, run = path, path.parent.parent
    elif (path / METRICS_NAME).exists() or (path / "checkpoints").is_dir():
        source, run = _of_run(path), path
    else:
        source, run = path, path.parent
    checkpoint = source if is_checkpoint_name(source.name) else None
    recipe, notes = _recipe(run, checkpoint)
    if checkpoint is not None:
        assert recipe is not None
        if (damage := find_damage(checkpoint)) is not None:
            raise UserError(f"{checkpoint}: damaged: {damage}; give an older checkpoint, or exported weights")
        config = recipe.model
        model = with_weights(lambda: NextScaleTransformer(config), read_weights(checkpoint, config), str(checkpoint))
        step: int | None = step_of(checkpoint)
    else:
        model, step = NextScaleTransformer.open(source, scales), step_of_weights(source)
    if tokenizer is None and recipe is None:
        raise UserError(f"--tokenizer: {source} does not tell its tokenizer; give its directory, or VAR's file")
    if tokenizer is None and recipe is not None and not recipe.tokenizer.exists():
        raise UserError(
            f"--tokenizer: {recipe.tokenizer}, which the run names, is not there; start in the directory where the run "
            "was started, or give it"
        )
    opened = Tokenizer.open(tokenizer or recipe.tokenizer, model.config.scales)  # type: ignore[union-attr]
    names, line = _class_names(recipe)
    notes += [line] if line else []
    subject = Subject(
        model.to(device),
        opened.to(device),
        device,
        source,
        names,
        run if recipe is not None else None,
        recipe,
        checkpoint,
        step,
    )
    return subject, notes


def _of_run(run: Path) -> Path:
    if checkpoints := list_checkpoints(run / "checkpoints"):
        return checkpoints[-1]
    for name in ("last", "best"):
        if has_weights(run / name):
            return run / name
    if (run / CONFIG_NAME).exists():
        return run  # weights of another kind: opening them says so
    raise UserError(f"{run}: a run without a checkpoint or exported weights; wait for its first checkpoint")


def _recipe(run: Path, checkpoint: Path | None) -> tuple[PretrainConfig | None, list[str]]:
    """The recipe that the weights are from, and a line where one is there but cannot be read."""
    if checkpoint is not None:
        return validate(PretrainConfig, read_state(checkpoint).recipe, str(checkpoint)), []
    if not (run / RECIPE_NAME).is_file():
        return None, []
    try:
        return load_config(PretrainConfig, run / RECIPE_NAME), []
    except UserError as error:  # of a tokenizer's training, or of another version
        said = " ".join(str(error).split())
        return None, [f"the run of {run}: its recipe is not of pretraining here ({said})"]


def _class_names(recipe: PretrainConfig | None) -> tuple[tuple[str, ...], str | None]:
    directory = recipe and (recipe.data.tokens or recipe.data.images)
    if not directory:
        return (), "class names: not known for weights alone; captions have the numbers"
    if not (directory / INDEX_NAME).exists():
        return (), f"class names: {directory} is not there any more; captions have the numbers"
    return ShardIndex.read(directory).classes, None


def write_index(directory: Path, subject: Subject, pictures: Sequence[Picture], left_out: Sequence[str]) -> Path:
    """Writes `inspect.json`: what each picture shows, and what could not be drawn.

    Pictures that an earlier command has drawn there of the same weights (`--only`) stay listed.
    """
    path = directory / "inspect.json"
    listed = {
        picture.path.name: {"shows": picture.shows, "data": picture.data and picture.data.name} for picture in pictures
    }
    earlier = _earlier(path, subject)
    kept = {name: facts for name, facts in earlier.items() if name not in listed and (directory / name).exists()}
    entries = [{"picture": name, **facts} for name, facts in {**kept, **listed}.items()]
    write_json(path, {**subject.facts, "pictures": entries, "left_out": list(left_out)})
    return path


def _earlier(path: Path, subject: Subject) -> dict[str, dict[str, Any]]:
    try:
        index = json.loads(path.read_text())
        if any(index[name] != value for name, value in subject.facts.items()):
            return {}
        return {entry.pop("picture"): entry for entry in index["pictures"]}
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is not ours
        return {}
