"""Exported weights: a separate directory, written by a run or from a checkpoint, that needs no DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mepa_ds.checkpoint.files import MANIFEST_NAME, find_damage, is_checkpoint_name, list_checkpoints
from mepa_ds.checkpoint.fragment import BUFFER, EMA, MASTER
from mepa_ds.checkpoint.state import read_state
from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig
from mepa_ds.errors import UserError
from mepa_ds.files import write_json
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.models.transformer_files import KIND
from mepa_ds.weights.directories import CONFIG_NAME, save_pretrained

TRANSFORMER = "transformer."
"""The objective's name for the transformer. In a checkpoint its parameters' names start with it."""
PROJECTOR = "projector."
WEIGHTS_FACTS_NAME = "training.json"


def export_checkpoint(checkpoint: Path, directory: Path, kind: str = MASTER, class_names: Sequence[str] = ()) -> None:
    """Writes a checkpoint's weights (`kind` master or ema) as safetensors + config.json, in one process.

    `class_names` are for checkpoints of earlier versions, which have none.
    """
    if not is_checkpoint_name(checkpoint.name) and not (checkpoint / MANIFEST_NAME).exists():
        of_a_run = list_checkpoints(checkpoint / "checkpoints")
        newest = f"; the newest of this run is {of_a_run[-1]}" if of_a_run else ""
        raise UserError(f"{checkpoint}: no checkpoint (a directory <output_dir>/checkpoints/step_...){newest}")
    if (damage := find_damage(checkpoint)) is not None:
        raise UserError(f"{checkpoint}: damaged: {damage}; export an older checkpoint")
    state = read_state(checkpoint)
    if kind == EMA and state.recipe["optim"].get("ema") is None:
        raise UserError(f"{checkpoint}: has no average of the weights: the run was without optim.ema")
    config = validate(ModelConfig, dict(state.recipe["model"]), str(checkpoint))
    convert_fragments(checkpoint, config, directory, kind, state.step, state.class_names or class_names)


def has_weights(directory: Path) -> bool:
    """Returns whether the directory holds a whole export."""
    return (directory / CONFIG_NAME).is_file()


def step_of_weights(directory: Path) -> int | None:
    """Returns the step of exported weights; None if there are no weights, or if their step is not known."""
    try:
        return int(json.loads((directory / WEIGHTS_FACTS_NAME).read_text())["step"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def convert_fragments(
    fragments: Path,
    config: ModelConfig,
    directory: Path,
    kind: str,
    step: int,
    class_names: Sequence[str] = (),
) -> None:
    """Writes weights in the Hugging Face layout, with a note of the step.

    `fragments` must hold at least the fragments of `kind` and the buffers.
    """
    save_pretrained(directory, config, read_weights(fragments, config, kind), KIND, class_names=class_names)
    write_json(directory / WEIGHTS_FACTS_NAME, {"step": step})


def read_weights(fragments: Path, config: ModelConfig, kind: str = MASTER) -> dict[str, Tensor]:
    """The transformer's state dict. Raises UserError when a tensor is missing or cannot be read."""
    from mepa_ds.checkpoint.store import read_tensors

    with torch.device("meta"):
        model = NextScaleTransformer(config)
    parameters = {name for name, _ in model.named_parameters()}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    sources = {name: f"{kind if name in parameters else BUFFER}/{TRANSFORMER}{name}" for name in shapes}
    flat = read_tensors(fragments, sources.values())
    return {name: flat[source].view(shapes[name]) for name, source in sources.items()}


def read_projector(fragments: Path) -> dict[str, Tensor] | None:
    """The state dict of the guidance's projector, which exports do not hold; None for a run without guidance."""
    from mepa_ds.checkpoint.store import read_tensors, stored_tensors

    prefix = f"{MASTER}/{PROJECTOR}"
    names = [name for name in stored_tensors(fragments) if name.startswith(prefix)]
    if not names:
        return None
    flat = {name.removeprefix(prefix): tensor for name, tensor in read_tensors(fragments, names).items()}
    # Stored flat: a weight has as many rows as its layer's bias has elements.
    return {
        name: tensor.view(len(flat[name.replace("weight", "bias")]), -1) if name.endswith("weight") else tensor
        for name, tensor in flat.items()
    }
