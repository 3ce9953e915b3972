"""What the runs of a sweep measured: a row a run, the lowest held-out cross-entropy first."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mepa_ds.files import write_json, write_text
from mepa_ds.runtime.metrics import METRICS_NAME, as_written, finite, read_metrics
from mepa_ds.safety.text import cell
from mepa_ds.scaling.running.collect import heldout_of, training_seconds
from mepa_ds.scaling.running.members import Member

_MEASURED = ("ce", "ce_last", "accuracy")
_FACTS = ("steps", "samples", "params_active", "params_total")


def table_of(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Returns a row for each run: the changed keys, seed, state, held-out scores of the last weights, and facts.

    Values that a run has not measured are None. Runs without a cross-entropy come last, in the order of the plan.
    """
    keys = list(dict.fromkeys(key for member in members for key in member.row["changes"]))
    rows = [_row(member, keys) for member in members]
    return sorted(rows, key=lambda row: row["ce"] if isinstance(row["ce"], float) else math.inf)


def _row(member: Member, keys: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {key: member.row["changes"].get(key) for key in keys}
    row |= {"seed": member.row["seed"], "state": member.state, **dict.fromkeys((*_MEASURED, "seconds"))}
    if member.state == "finished":
        path = Path(member.row["output_dir"]) / METRICS_NAME
        with as_written(path):
            records = list(read_metrics(path))
            if (heldout := heldout_of(member.row, records)) is not None:
                row |= {key: heldout[key] for key in _MEASURED}
            row["seconds"] = training_seconds(member.row, records)
    return row | {key: member.row[key] for key in _FACTS} | {"run": member.name}


def write_table(rows: Sequence[dict[str, Any]], output_dir: Path) -> Path:
    """Writes sweep.csv and sweep.json; returns the path of the first. Lists and null are written as JSON has them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: json.dumps(v) if isinstance(v, (list, dict)) else cell(v) for key, v in row.items()})
    write_text(output_dir / "sweep.csv", text.getvalue())
    write_json(output_dir / "sweep.json", finite(list(rows)))
    return output_dir / "sweep.csv"


def format_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the cells of the table for people, the heading first: changed keys, seed, state, scores, seconds."""
    shown = [key for key in rows[0] if key not in (*_FACTS, "run")]
    return [shown, *([_cell(row[key]) for key in shown] for row in rows)]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
