"""The checkpoint of a tokenizer's training: one file, written by the main rank and read by all ranks."""

from __future__ import annotations

import json
from typing import Any

from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
from mepa_ds.errors import UserError
from mepa_ds.files import write_torch
from mepa_ds.weights.state_dict_files import read_torch_file

CHECKPOINT_NAME = "checkpoint.pt"
_KEYS = (
    "step", "position", "tokenizer", "optimizer", "usage", "adversary", "record", "num_replaced", "unevaluated",
    "images", "config",
)  # fmt: skip
# A resumed run may change how and how long it runs, but not what it computes.
_FIXED = ("seed", "tokenizer", "loss", "codebook", "optim", "precision")


def write_checkpoint(config: TokenizerTrainingConfig, state: dict[str, Any]) -> None:
    """Writes the checkpoint atomically. Raises UserError when it cannot be written, for example to a full disk."""
    path = config.output_dir / CHECKPOINT_NAME
    try:
        write_torch(path, state | {"config": config.model_dump_json()})
    except OSError as error:
        raise UserError(
            f"{path}: could not be written ({error.strerror or error}); make room and start again: "
            "what was there before is kept"
        ) from error


def read_checkpoint(config: TokenizerTrainingConfig, images: str) -> dict[str, Any] | None:
    """Reads the checkpoint; None if there is none. `images` names the training images and their order.

    Raises:
        UserError: when the checkpoint is damaged, or was made with another recipe or other images.
    """
    path = config.output_dir / CHECKPOINT_NAME
    if not path.exists():
        return None
    checkpoint: dict[str, Any] = read_torch_file(path, "Remove it to start anew")
    if not isinstance(checkpoint, dict) or (lost := [key for key in _KEYS if key not in checkpoint]):
        found = f"no {', '.join(lost)} in it" if isinstance(checkpoint, dict) else f"a {type(checkpoint).__name__}"
        raise UserError(f"{path}: not a checkpoint of this program ({found}); remove it to start anew")
    old, new = json.loads(checkpoint["config"]), json.loads(config.model_dump_json())
    changed = [key for key in _FIXED if old.get(key) != new[key]]
    if old["train"]["global_batch"] != new["train"]["global_batch"]:
        changed.append("train.global_batch")
    if checkpoint["images"] != images:
        raise UserError(
            f"{path} was made from other images ({checkpoint['images']}) than those of data.images: "
            f"{config.data.images} ({images}). Give those again to resume, or another output_dir (with start_from: "
            f"{config.output_dir} to go on from a finished run's weights)"
        )
    if changed:
        raise UserError(
            f"{path} was made by another recipe: {', '.join(changed)} changed since (its recipe is in resolved.yaml). "
            "Change it back to resume, or give another output_dir"
        )
    return checkpoint
