"""Checks whether a recipe can continue from a checkpoint, and which parts of the checkpoint's state still hold."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mepa_ds import distributed, log
from mepa_ds.checkpoint.state import RunState
from mepa_ds.config.base import validate
from mepa_ds.config.changes import changed, recipe_changes
from mepa_ds.config.model import ModelConfig
from mepa_ds.config.objective import AlignmentConfig
from mepa_ds.config.pretrain import PretrainConfig, TrainConfig
from mepa_ds.errors import UserError
from mepa_ds.pretrain.checkpointing import BEST, RunCheckpoints


def check_checkpoint(path: Path, state: RunState, config: PretrainConfig, data: dict[str, str]) -> None:
    """Checks that the recipe can continue from a checkpoint. `data` is what its samples depend on (`data_identity`).

    Raises:
        UserError: on every rank. It names what differs, how to continue, and how to start anew.
    """
    _check_model(path, state, config.model, config.objective.alignment)
    _check_length(path, state, config.train)
    if lines := differences(state.data, data):
        raise UserError(
            f"{path}: the checkpoint was trained on other data ({'; '.join(lines)}), so the run "
            "cannot go on from its place in them; restore the data, or choose another output_dir",
            agreed=True,
        )


def _check_length(path: Path, state: RunState, train: TrainConfig) -> None:
    """Raises UserError, on every rank, when the recipe would change the length of a half-finished run."""
    theirs = state.recipe["train"]["global_batch"]
    if train.steps is None and theirs != train.global_batch:
        raise UserError(
            f"train.global_batch: {theirs} in {path}, {train.global_batch} now: this would change the number of "
            "steps of a half-finished run, whose length is in epochs or samples; restore it, or give train.steps",
            agreed=True,
        )


def _check_model(path: Path, state: RunState, ours: ModelConfig, alignment: AlignmentConfig | None) -> None:
    lines = model_differences(path, state, ours)
    if alignment is not None:  # the projector is not in the model's config; without guidance it may be dropped
        hidden = ((state.recipe.get("objective") or {}).get("alignment") or {}).get("projector_hidden")
        if hidden != alignment.projector_hidden:
            key = "objective.alignment.projector_hidden"
            lines.append(f"{key}: {hidden!r} there, {alignment.projector_hidden!r} now")
    if lines:
        raise UserError(
            f"{path}: the checkpoint's model differs from the recipe's ({'; '.join(lines)}); "
            "restore the recipe or choose another output_dir",
            agreed=True,
        )


def model_differences(path: Path, state: RunState, ours: ModelConfig) -> list[str]:
    """Returns a line for each key of the model that differs from the checkpoint's; newer keys had their defaults."""
    theirs = validate(ModelConfig, dict(state.recipe["model"]), str(path))
    expected, found = (json.loads(model.model_dump_json()) for model in (ours, theirs))
    return differences(found, expected, "model.")


def differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns a line for each value that differs between two nested mappings, with its dotted key after `prefix`."""
    pairs = changed(theirs, ours).items()
    return [f"{prefix}{key}: {there!r} there, {now!r} now" for key, (there, now) in pairs]


def changes_since(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, list[Any]]:
    """Returns [old, new] by key of what a start changes in a checkpoint's recipe.

    A key that is newer than the checkpoint had its default, so that alone is no change.
    """
    with suppress(UserError):  # of a recipe of an older version, which today's keys do not describe
        theirs = json.loads(validate(PretrainConfig, theirs, "").model_dump_json())
    return recipe_changes(theirs, ours)


def without_missing_best(checkpoints: RunCheckpoints, state: RunState, has_heldout: bool) -> RunState:
    """Returns the state, without its best score if the weights in `best` are missing. Collective.

    They are missing when only checkpoints were copied, or when `best` was removed. The next evaluation's weights then
    count as the best. If the checkpoint's step was evaluated before, it is evaluated again when this start begins.
    `has_heldout` says whether there will be an evaluation.
    """
    if state.best_heldout_ce == float("inf") or checkpoints.has_best():
        return state
    if distributed.is_main():
        remedy = "the next evaluation's weights will be stored there, though earlier ones may have been better"
        if not has_heldout:
            remedy = "data.heldout_tokens is not set, so none will follow; mepa export writes a checkpoint's weights"
        best = checkpoints.directory.parent / BEST
        log.note(f"warning: {best} has no weights, though evaluations of this run had found its best ones: {remedy}")
    return replace(state, best_heldout_ce=float("inf"), evaluated_step=0)
