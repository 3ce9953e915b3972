"""The numbers of a run that a model card tells: those of the exported step where there are such."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mepa_ds.checkpoint.run_models import RunModel
from mepa_ds.errors import UserError
from mepa_ds.reports.records import RunRecords, read_records
from mepa_ds.runtime.metrics import METRICS_NAME
from mepa_ds.safety.reading import read_json_object

BEST = "best"
_SCORES = "scores.json"
"""What `mepa evaluate --json` wrote, in the run's directory or beside it."""
_NO_SCORES = ("step", "seconds", "num_samples")
_INTERVALS = ("_low", "_high", "_std")
_MOST_SCORES = 12
_HELD_OUT = {
    "ce": "Held-out cross-entropy (nats a token)",
    "ce_last": "Held-out cross-entropy of the last scale",
    "accuracy": "Held-out accuracy of the next token",
}


def numbers_of(found: RunModel) -> tuple[dict[str, str], list[str]]:
    """Numbers by what they say, and lines of what is not known. A card of a run without records does without them."""
    run, step = found.run, found.step
    try:
        records = read_records(run)
    except UserError:
        return {}, [f"numbers: {run / METRICS_NAME} has no records of this run; the card has none"]
    said, lines = {}, []
    start, held_out = _of_step(records.of("start"), step), _of_step(records.of("heldout"), step)
    if step is not None:
        said["Training steps"] = f"{step:,}"
    if (epoch := _epoch(records, step)) is not None:
        said["Epochs"] = f"{epoch:.4g}"
    if "device" in start:
        said["Trained on"] = f"{start.get('world_size', 1)} x {start['device']}, {start.get('precision', '')}".rstrip(
            ", "
        )
    if not held_out:
        lines.append("numbers: the run has no held-out evaluation of this step; the card has no score of it")
    finite = {key: value for key, value in held_out.items() if _is_finite(value)}  # "nan" stands in the file as a text
    if held_out and "ce" not in finite:
        lines.append("numbers: the held-out cross-entropy of this step is not finite; the card has no score of it")
    said |= {meaning: f"{finite[key]:.4f}" for key, meaning in _HELD_OUT.items() if key in finite}
    score = _of_step(records.of("score"), step)
    scores = _shown(score)
    if found.checkpoint is None and found.source.name == BEST:  # what samples are drawn from, and scored
        scores |= _shown(_written_scores(run))
    return said | dict(list(scores.items())[:_MOST_SCORES]), lines


def _epoch(records: RunRecords, step: int | None) -> float | None:
    """Of the last training record up to a step; None without a finite one."""
    if "epoch" not in records.train:
        return None
    epochs_N = records.train["epoch"][records.steps <= (np.inf if step is None else step)]
    return float(epochs_N[-1]) if len(epochs_N) and np.isfinite(epochs_N[-1]) else None


def _of_step(records: list[dict[str, Any]], step: int | None) -> dict[str, Any]:
    """The last record up to a step: evaluations come after their step."""
    return next((r for r in reversed(records) if step is None or r.get("step", 0) <= step), {})


def _written_scores(run: Path) -> dict[str, Any]:
    for path in (run / _SCORES, run.parent / _SCORES):
        try:
            return read_json_object(path)
        except (OSError, ValueError):
            continue
    return {}


def _shown(scores: dict[str, Any]) -> dict[str, str]:
    """Scores with their 95 % intervals."""
    found = {}
    for name, value in scores.items():
        if not _is_finite(value) or name in _NO_SCORES or name.startswith("num_") or name.endswith(_INTERVALS):
            continue
        low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
        interval = f" ({low:.4g} to {high:.4g})" if isinstance(low, float) and isinstance(high, float) else ""
        found[f"`{name}`"] = f"{value:.4g}{interval}"
    return found


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
