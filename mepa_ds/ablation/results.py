"""What the runs of an ablation measured: one row a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mepa_ds.ablation.statistics import Scores
from mepa_ds.errors import UserError
from mepa_ds.evaluation.measures import INTERVAL
from mepa_ds.runtime.metrics import as_written, read_metrics
from mepa_ds.scaling.running.collect import heldout_of, training_seconds
from mepa_ds.scaling.running.members import Member

_KEPT = ("run", "arm", "seed", "steps", "samples", "params_total", "params_active", "flops_image")
_OF_PROTOCOL = ("sampling", "reference", "num_reference", "spaces", "classifier", "order")
"""What scores of generated images must share to be compared."""
LOAD_VARIANCE = "load_variance"
"""Variance over experts of their load in percent (0 when even), mean over layers and scales, at the last record."""


@dataclass(frozen=True)
class Results:
    """What was read from the records of the runs."""

    table: pd.DataFrame
    """A row for each run of the plan: facts of the plan, `state`, and of finished runs the held-out scores of the last
    weights (`ce`, `ce_last`, `accuracy`, `ce_scale_1`, ...), every number of the record `score`, `load_variance`,
    `entropy` of the routers (nats), and `seconds` in training steps."""
    protocol: dict[str, Any]
    """How generated images were scored; empty where none were."""
    load_variance: dict[str, NDArray[np.float64]]
    """By arm: (runs, scales) variance of the experts' load in percent, mean over layers; arms without experts are left
    out."""


def read_results(members: Sequence[Member]) -> Results:
    """Reads the records of all finished runs.

    Raises:
        UserError: a finished run lacks the score of its last weights, or images were scored in two ways.
    """
    rows: list[dict[str, Any]] = []
    protocols: dict[str, dict[str, Any]] = {}
    variance: dict[str, list[NDArray[np.float64]]] = {}
    for member in members:
        row = {key: member.row[key] for key in _KEPT} | {"state": member.state}
        rows.append(row)
        if member.state != "finished":
            continue
        path = Path(member.row["output_dir"]) / "metrics.jsonl"
        with as_written(path):
            records = [record for record in read_metrics(path) if {"event", "step"} <= record.keys()]
            row |= _measured(member.row, records)
            scores = [record for record in records if record["event"] == "score" and record["step"] == row["steps"]]
            if scores:
                row |= scores_of(scores[-1])
                protocols[member.name] = dict(scores[-1].get("protocol", {}))
            if routing := [record for record in records if record["event"] == "routing"]:
                layers = routing[-1]["layers"].values()
                variance_S = np.mean([layer["load_variance_scale"] for layer in layers], axis=0)
                variance.setdefault(str(member.row["arm"]), []).append(variance_S)
                row[LOAD_VARIANCE] = float(variance_S.mean())
                row["entropy"] = float(np.mean([layer["entropy_scale"] for layer in layers]))
    _check_protocols(protocols, members)
    return Results(
        pd.DataFrame(rows),
        next(iter(protocols.values()), {}),
        {arm: np.stack(rows_S) for arm, rows_S in variance.items()},
    )


def _check_protocols(protocols: Mapping[str, Mapping[str, Any]], members: Sequence[Member]) -> None:
    """Raises UserError where log.score has changed since a part of the runs was scored."""
    told = {name: protocol for name, protocol in protocols.items() if protocol.keys() & set(_OF_PROTOCOL)}
    for name, protocol in told.items():
        first, expected = next(iter(told.items()))
        if changed := [key for key in _OF_PROTOCOL if protocol.get(key) != expected.get(key)]:
            raise UserError(
                f"{name} and {first} were scored in two ways ({', '.join(changed)} differ): log.score has changed in "
                "between. Restore it; or remove the directories of the runs that were scored the old way (in "
                f"{Path(members[0].row['output_dir']).parent}), and run the ablation again"
            )


def _measured(row: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    heldout = heldout_of(row, records)
    if heldout is None:
        raise UserError(
            f"{row['output_dir']}: the run is finished, but metrics.jsonl has no held-out score of step "
            f"{row['steps']}, its last; remove the directory and run the ablation again"
        )
    values = {"ce": heldout["ce"], "ce_last": heldout["ce_last"], "accuracy": heldout["accuracy"]}
    values |= {f"ce_scale_{scale}": ce for scale, ce in enumerate(heldout["ce_scale"], start=1)}
    return values | {"seconds": training_seconds(row, records)}


_COUNTS = ("step", "seconds", "num_samples", "num_reference")


def scores_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record of generated images' scores, without their intervals over images and the protocol."""
    return {
        key: float(value)
        for key, value in record.items()
        if isinstance(value, (int, float)) and key not in _COUNTS and not key.endswith(INTERVAL)
    }


def scores_by_arm(table: pd.DataFrame, column: str) -> Scores:
    """A column by arm and seed, without runs that lack it."""
    found: dict[str, dict[int, float]] = {}
    for arm, seed, value in zip(table["arm"], table["seed"], table[column], strict=True):
        if value is not None and np.isfinite(value):
            found.setdefault(str(arm), {})[int(seed)] = float(value)
    return found
