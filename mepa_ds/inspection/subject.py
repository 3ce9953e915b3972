"""What is inspected: the model and its tokenizer, and as much of the run that made it as is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mepa_ds.checkpoint.run_models import RunModel, find_model
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.shards.index import INDEX_NAME
from mepa_ds.files import write_json
from mepa_ds.generation.class_names import caption, which_of
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.safety.reading import read_json_object
from mepa_ds.tokenizer.tokenizer import Tokenizer


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

    def which(self, classes: Sequence[int]) -> str:
        """The end of a picture's title where it does not show all classes: `; 8 of 1000 classes`."""
        return which_of(classes, self.model.config.num_classes)

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
    """Opens a run (its newest checkpoint, or else its exported weights), a project with one run, a checkpoint, or
    weights; and lines to say.

    Raises:
        UserError: there is nothing of the kind, it is damaged, or no tokenizer is known.
    """
    found = find_model(path)
    model = found.open(scales)
    opened = Tokenizer.open(found.tokenizer(tokenizer), model.config.scales)
    recipe = found.recipe
    line = None if model.class_names else _why_no_names(found)
    subject = Subject(
        model.to(device),
        opened.to(device),
        device,
        found.source,
        model.class_names,
        found.run if recipe is not None else None,
        recipe,
        found.checkpoint,
        found.step,
    )
    return subject, [*found.notes, *([line] if line else [])]


def _why_no_names(found: RunModel) -> str | None:
    directory = found.data_of_names()
    if directory is None:
        return "class names: not known for weights alone; captions have the numbers"
    if not (directory / INDEX_NAME).exists():
        return f"class names: {directory} is not there any more; captions have the numbers"
    return None


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
        index = read_json_object(path)
        if any(index[name] != value for name, value in subject.facts.items()):
            return {}
        found = {entry.pop("picture"): entry for entry in index["pictures"]}
        return {name: facts for name, facts in found.items() if Path(name).name == name}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is none, or it is not ours
        return {}
