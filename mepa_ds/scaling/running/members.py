"""How the runs of a study are doing, read from what each has written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mepa_ds.config.base import read_yaml
from mepa_ds.runtime.run_lock import is_held

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
    facts: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        facts = json.loads((directory / "status.json").read_text())
    return Member(row, _state(row, directory, facts), int(facts.get("step", row["first_step"])), facts)


def _state(row: Mapping[str, Any], directory: Path, facts: Mapping[str, Any]) -> State:
    told = facts.get("state")
    if told == "finished" and facts.get("step") == row["steps"] and is_current(row):
        return "finished"
    if told == "diverged" and is_current(row):
        return "diverged"
    if told is not None and is_held(directory):
        return "running"
    if told == "failed":
        return "failed"
    if told in ("running", "requeue", "finished"):  # killed, stopped, or finished by an older recipe
        return "stopped"
    if row["waits_for_sweep"] or (row["branches_off"] and not branch_point(row).is_dir()):
        return "waiting"
    return "planned"


def branch_point(row: Mapping[str, Any]) -> Path:
    """Returns the checkpoint from which a branch starts."""
    return Path(read_yaml(Path(row["recipe"]))["branch_from"])


def is_current(row: Mapping[str, Any]) -> bool:
    """Whether a run was done by today's recipe. Where the data lie, and what is logged, does not count."""
    with suppress(Exception):
        ran = read_yaml(Path(row["output_dir"]) / "resolved.yaml")
        return _what_counts(ran) == _what_counts(read_yaml(Path(row["recipe"])))
    return False


def recipe_hash(recipe: dict[str, Any]) -> str:
    """Returns a hash of what changes the result of a recipe."""
    return hashlib.sha256(json.dumps(_what_counts(recipe), sort_keys=True).encode()).hexdigest()[:12]


def _what_counts(recipe: dict[str, Any]) -> dict[str, Any]:
    data = {key: recipe["data"].get(key) for key in ("unique_images", "on_damaged")}
    kept = ("seed", "model", "objective", "optim", "train")
    return {"data": data} | {key: recipe.get(key) for key in kept}
