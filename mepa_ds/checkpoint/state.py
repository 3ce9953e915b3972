"""The state of a run besides its tensors: `run.json` of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import mepa_ds
from mepa_ds.errors import UserError
from mepa_ds.files import read_file
from mepa_ds.safety.reading import MOST_JSON_BYTES

RUN_NAME = "run.json"
_INNER: dict[str, type | tuple[type, ...]] = {
    "loss_scaler": (int, float), "data": str, "class_names": str, "versions": str,
}  # fmt: skip
"""Types of the values in a field."""


def versions() -> dict[str, str]:
    """Of this package, and of the libraries that decide what a run computes, by name."""
    return {"mepa_ds": mepa_ds.__version__} | {name: metadata.version(name) for name in ("torch", "deepspeed")}


@dataclass
class RunState:
    """The state of a run besides its tensors. All of it is independent of the number of ranks.

    There is no state of random generators: every random number of a run is a function of (seed, position).
    """

    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Images consumed: the position in the endless sample stream."""
    adam_step: int = 0
    """Steps that Adam has seen (skipped steps do not count)."""
    best_heldout_ce: float = float("inf")
    """Lowest held-out cross-entropy so far (inf before the first evaluation)."""
    evaluated_step: int = 0
    """Step of the last held-out evaluation."""
    scored_step: int = 0
    """Step of the last scores of generated images."""
    metrics_records: int = 0
    """Number of records in metrics.jsonl. Later records belong to steps that are trained again."""
    skipped_steps: int = 0
    """Steps that were skipped because something was not finite, including skipped steps before a rollback."""
    replaced_samples: int = 0
    """Damaged samples that were replaced by others (data.on_damaged = "skip"), up to the last logged step."""
    window: dict[str, Any] = field(default_factory=dict)
    """Sums of the steps since the last record in metrics.jsonl (recording.window); empty right after a record."""
    loss_scaler: dict[str, float] = field(default_factory=dict)
    """fp16's dynamic loss scale."""
    data: dict[str, str] = field(default_factory=dict)
    """Identities of everything that the order and content of the samples depend on, by key of the recipe."""
    heldout: str = ""
    """Identity of the held-out tokens on which `best_heldout_ce` was measured."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe."""
    class_names: list[str] = field(default_factory=list)
    """Names of the classes by label; empty if the data have none. Exports have them; nothing else depends on them."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of this package and of the libraries that wrote the checkpoint."""


def read_state(path: Path) -> RunState:
    """Reads `run.json`. Raises UserError for a directory that holds no checkpoint of this project."""
    try:
        values = json.loads(read_file(path / RUN_NAME, MOST_JSON_BYTES))  # of no score yet, it has an Infinity
        if not isinstance(values, dict):
            raise ValueError(f"{RUN_NAME} holds no object")
        _check(values)
        return RunState(**values)
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a checkpoint of this project: {error}") from error


def _check(values: dict[str, Any]) -> None:
    """Raises ValueError for a value of another type than the field's, and for negative counts. Fields that are unknown,
    the constructor refuses."""
    like = RunState()
    for name, value in values.items():
        kind = type(getattr(like, name, value))
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise ValueError(f"{RUN_NAME}: {name} is not of type {kind.__name__}")
        if kind is int and not 0 <= value < 1 << 62:
            raise ValueError(f"{RUN_NAME}: {name} is {value}")
    for name, inner in _INNER.items():
        found = values.get(name, {})
        if not all(isinstance(value, inner) for value in (found.values() if isinstance(found, dict) else found)):
            raise ValueError(f"{RUN_NAME}: a value of {name} is not of the type that it has there")
