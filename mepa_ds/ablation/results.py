"""What the runs of an ablation measured: one row a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mepa_ds.ablation.statistics import Scores
from mepa_ds.errors import UserError
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.scaling.running.members import Member

_KEPT = ("run", "arm", "seed", "steps", "samples", "params_total", "params_active", "flops_image")
_OF_PROTOCOL = ("sampling", "reference", "num_reference", "spaces", "classifier", "order")
"""What scores of generated images must share to be compared."""
LOAD_VARIANCE = "load_variance"
"""Variance over experts of their load in percent (0 when even), mean over layers and scales, at the last record."""


def table_of(members: Sequence[Member]) -> pd.DataFrame:
    """A row for each run of the plan: facts of the plan, `state`, and of finished runs the held-out scores of the last
    weights (`ce`, `ce_last`, `accuracy`, `ce_scale_1`, ...), every number of the record `score`, `load_variance`,
    `entropy` of the routers (nats), and `seconds` in training steps.

    Raises:
        UserError: a finished run lacks the score of its last weights.
    """
    rows = []
    for member in members:
        row = {key: member.row[key] for key in _KEPT} | {"state": member.state}
        if member.state == "finished":
            row |= _measured(member.row)
        rows.append(row)
    _check_protocols(members)
    return pd.DataFrame(rows)


def _check_protocols(members: Sequence[Member]) -> None:
    """Raises UserError where log.score has changed since a part of the runs was scored."""
    first: tuple[str, dict[str, Any]] | None = None
    for member in members:
        mine = {key: value for key, value in protocol_of([member]).items() if key in _OF_PROTOCOL}
        if mine and first is None:
            first = member.name, mine
        if first is None or not mine:
            continue
        if changed := [key for key in _OF_PROTOCOL if mine.get(key) != first[1].get(key)]:
            raise UserError(
                f"{member.name} and {first[0]} were scored in two ways ({', '.join(changed)} differ): log.score has "
                "changed in between. Restore it; or remove the directories of the runs that were scored the old way "
                f"(in {Path(member.row['output_dir']).parent}), and run the ablation again"
            )


def _measured(row: Mapping[str, Any]) -> dict[str, Any]:
    path = Path(row["output_dir"]) / "metrics.jsonl"
    records = list(read_metrics(path))
    at_end = {record["event"]: record for record in records if record["step"] == row["steps"]}
    if "heldout" not in at_end:
        raise UserError(
            f"{path}: the run is finished, but there is no held-out score of step {row['steps']}, its last; remove "
            f"{path.parent} and run the ablation again"
        )
    heldout = at_end["heldout"]
    values = {"ce": heldout["ce"], "ce_last": heldout["ce_last"], "accuracy": heldout["accuracy"]}
    values |= {f"ce_scale_{scale}": ce for scale, ce in enumerate(heldout["ce_scale"], start=1)}
    values |= scores_of(at_end.get("score", {}))
    if routing := [record for record in records if record["event"] == "routing"][-1:]:
        layers = routing[0]["layers"].values()
        values[LOAD_VARIANCE] = float(np.mean([layer["load_variance_scale"] for layer in layers]))
        values["entropy"] = float(np.mean([layer["entropy_scale"] for layer in layers]))
    train, before, seconds = [r for r in records if r["event"] == "train"], 0, 0.0
    for record in train:
        seconds += record["mean_step_seconds"] * max(record["step"] - before, 0)
        before = record["step"]
    return values | {"seconds": seconds}


_INTERVAL, _COUNTS = ("_error", "_low", "_high"), ("step", "seconds", "num_samples", "num_reference")


def scores_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record of generated images' scores, without their intervals over images and the protocol."""
    return {
        key: float(value)
        for key, value in record.items()
        if isinstance(value, (int, float)) and key not in _COUNTS and not key.endswith(_INTERVAL)
    }


def protocol_of(members: Sequence[Member]) -> dict[str, Any]:
    """How the first finished run's images were scored; empty where none was."""
    for member in members:
        if member.state == "finished":
            for record in read_metrics(Path(member.row["output_dir"]) / "metrics.jsonl"):
                if record["event"] == "score":
                    protocol: dict[str, Any] = json.loads(json.dumps(record.get("protocol", {})))
                    return protocol
    return {}


def scores_by_arm(table: pd.DataFrame, column: str) -> Scores:
    """A column by arm and seed, without runs that lack it."""
    found: dict[str, dict[int, float]] = {}
    for arm, seed, value in zip(table["arm"], table["seed"], table[column], strict=True):
        if value is not None and np.isfinite(value):
            found.setdefault(str(arm), {})[int(seed)] = float(value)
    return found


def routing_by_scale(members: Sequence[Member]) -> dict[str, np.ndarray]:
    """By arm: (runs, scales) variance of the experts' load in percent, mean over layers; arms without experts are left
    out."""
    found: dict[str, list[np.ndarray]] = {}
    for member in members:
        if member.state != "finished":
            continue
        records = [r for r in read_metrics(Path(member.row["output_dir"]) / "metrics.jsonl") if r["event"] == "routing"]
        if records:
            layers = records[-1]["layers"].values()
            variance_S = np.mean([layer["load_variance_scale"] for layer in layers], axis=0)
            found.setdefault(str(member.row["arm"]), []).append(variance_S)
    return {arm: np.stack(rows) for arm, rows in found.items()}
