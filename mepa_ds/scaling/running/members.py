"""How the runs of a study are doing, read from what each has written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mepa_ds import log
from mepa_ds.config.base import read_yaml, validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.files import rename_aside
from mepa_ds.runtime.run_lock import is_held
from mepa_ds.runtime.status import read_status

State = Literal["waiting", "planned", "running", "stopped", "finished", "failed", "diverged"]


@dataclass(frozen=True)
class Member:
    """A run of a study at this moment."""

    row: Mapping[str, Any]
    """Its row of plan.json."""
    state: State
    """waiting: its learning rate or its trunk is not there yet; planned: not started; stopped: to be started again."""
    step: int
    """Optimizer steps done."""
    facts: Mapping[str, Any]
    """status.json: loss, images_per_second, seconds_left, error, as far as they are there."""

    @property
    def name(self) -> str:
        return str(self.row["run"])

    @property
    def share(self) -> float:
        """Share of its own steps that is done."""
        first = self.row["first_step"]
        return min(max(self.step - first, 0) / max(self.row["steps"] - first, 1), 1.0)


def member_of(row: Mapping[str, Any]) -> Member:
    """Looks at one run."""
    directory = Path(row["output_dir"])
    facts = read_status(directory)
    return Member(row, _state(row, directory, facts), int(facts.get("step", row["first_step"])), facts)


def _state(row: Mapping[str, Any], directory: Path, facts: Mapping[str, Any]) -> State:
    told = facts.get("state")
    if told is not None and is_held(directory):
        return "running"
    if told is not None and is_current(row):
        if told == "finished" and facts.get("step") == row["steps"]:
            return "finished"
        if told in ("diverged", "failed"):
            return "diverged" if told == "diverged" else "failed"
        return "stopped"  # asked to, or killed
    if told == "failed":  # before it had a recipe of its own
        return "failed"
    if row["waits_for_sweep"] or (row["branches_off"] and not branch_point(row).is_dir()):
        return "waiting"
    return "planned"


def set_stale_aside(row: Mapping[str, Any]) -> Path | None:
    """Renames the directory of a run that another recipe has trained, since to resume from it would mix the two.

    Returns the new name; None if there is nothing to rename.
    """
    directory = Path(row["output_dir"])
    if not (directory / "resolved.yaml").is_file() or is_current(row) or is_held(directory):
        return None
    aside = rename_aside(directory, "before")
    log.note(f"{directory}: was trained by another recipe, which the study file has changed since; it is {aside} now")
    return aside


def branch_point(row: Mapping[str, Any]) -> Path:
    """Returns the checkpoint from which a branch starts."""
    return Path(read_yaml(Path(row["recipe"]))["branch_from"])


def is_current(row: Mapping[str, Any]) -> bool:
    """Whether a run was done by today's recipe. Where the data lie, and what is logged, does not count.

    The name of the feature set does: it says which teacher the features are of.
    """
    resolved = Path(row["output_dir"]) / "resolved.yaml"
    try:
        return _what_counts(_recipe(resolved)) == _what_counts(_recipe(Path(row["recipe"])))
    except UserError:  # one of them is not there, or cannot be a recipe any more
        return False


def _recipe(path: Path) -> dict[str, Any]:
    """Returns a recipe with keys that are newer than the file at their defaults."""
    recipe: dict[str, Any] = json.loads(validate(PretrainConfig, read_yaml(path), str(path)).model_dump_json())
    return recipe


def recipe_hash(recipe: dict[str, Any]) -> str:
    """Returns a hash of what changes the result of a recipe."""
    return hashlib.sha256(json.dumps(_what_counts(recipe), sort_keys=True).encode()).hexdigest()[:12]


def _what_counts(recipe: dict[str, Any]) -> dict[str, Any]:
    data = {key: recipe["data"].get(key) for key in ("unique_images", "on_damaged")}
    if features := recipe["data"].get("features"):
        data["features"] = Path(features).name
    kept = ("seed", "model", "objective", "optim", "train")
    return {"data": data} | {key: recipe.get(key) for key in kept}
