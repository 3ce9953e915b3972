"""What a pretraining run did, read from its metrics.jsonl alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mepa_ds.errors import UserError
from mepa_ds.metrics import read_metrics


def run_report(run_directory: Path) -> dict[str, Any]:
    """The run's facts, last training scores, best held-out scores, throughput and expert load per scale.

    `expert_load_per_scale` is (scales, experts), the mean over MoE layers of each expert's share of routed tokens at
    the last logged step. Raises UserError for a directory without a run.
    """
    path = run_directory / "metrics.jsonl"
    records = list(read_metrics(path))
    by_event: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_event.setdefault(record["event"], []).append(record)
    if "start" not in by_event or "train" not in by_event:
        raise UserError(f"{path}: no training is recorded there; give the output_dir of a pretraining run")
    facts = {key: value for key, value in by_event["start"][-1].items() if key not in ("event", "step")}
    train = by_event["train"][-1]
    # An earlier start may have had other ranks.
    last_start = max(number for number, record in enumerate(records) if record["event"] == "start")
    of_this_start = [record for record in records[last_start:] if record["event"] == "train"] or by_event["train"]
    report: dict[str, Any] = {
        **facts,
        "steps": train["step"],
        "epochs": train["epoch"],
        # The median: first steps and steps that share the machine with others do not count.
        "samples_per_second": float(np.median([record["images_per_second"] for record in of_this_start])),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in of_this_start),
        "train_ce": train["ce"],
        "train_ce_last_scale": train["ce_last"],
    }
    if found := [record for record in by_event.get("heldout", []) if record.get("best")]:
        best = found[-1]  # of the weights in `best`: scores on other held-out tokens before do not count
        report |= {
            "heldout_ce": best["ce"],
            "heldout_ce_last_scale": best["ce_last"],
            "heldout_accuracy": best["accuracy"],
            "best_step": best["step"],
        }
    if "routing" in by_event:
        layers = by_event["routing"][-1]["layers"].values()
        load_SE = np.mean([layer["load_scale"] for layer in layers], axis=0)
        report["expert_load_per_scale"] = np.round(load_SE, 4).tolist()
    return report


def format_report(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    lines = []
    for key, value in report.items():
        if key == "expert_load_per_scale":
            lines.append("expert load, percent (rows: scales, columns: experts)")
            lines += ["    " + " ".join(f"{100 * share:6.1f}" for share in row) for row in value]
        elif isinstance(value, dict):
            lines.append(key.replace("_", " "))
            lines += [f"    {inner:<26} {_format(inner, item)}" for inner, item in value.items()]
        else:
            lines.append(f"{key.replace('_', ' '):<30} {_format(key, value)}")
    return "\n".join(lines)


def _format(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return f"{value / 2**20:.0f} MiB"
    if key.endswith("_parameters"):
        return f"{value / 1e6:.2f}M"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
