"""What a pretraining run did, read from its metrics.jsonl alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mepa_ds.errors import UserError
from mepa_ds.runtime.metrics import read_metrics


def run_report(run_directory: Path) -> dict[str, Any]:
    """The run's facts, last training scores, best held-out scores, throughput and expert load per scale.

    Facts, throughput and memory are the last start's; `starts` has these of every start, with the steps that it took.
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
    train, starts = by_event["train"][-1], _starts(records)
    # An earlier start may have had other ranks.
    of_this_start = starts[-1][1] or by_event["train"]
    report: dict[str, Any] = {
        **facts,
        "steps": train["step"],
        "epochs": train["epoch"],
        # The median, so that first steps and steps that share the machine with others hardly count.
        "samples_per_second": float(np.median([record["images_per_second"] for record in of_this_start])),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in of_this_start),
        "starts": [_summary(start, trained) for start, trained in starts],
        "train_ce": train["ce"],
        "train_ce_last_scale": train["ce_last"],
    }
    if found := [record for record in by_event.get("heldout", []) if record.get("best")]:
        best = found[-1]  # the score of the weights in `best`; earlier scores may be of other held-out tokens
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


def _starts(records: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each start with its training records. Records of steps that were taken again are not among them."""
    starts: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    for record in records:
        if record["event"] == "start":
            starts.append((record, []))
        elif record["event"] == "train" and starts:
            starts[-1][1].append(record)
    return starts


def _summary(start: dict[str, Any], trained: list[dict[str, Any]]) -> dict[str, Any]:
    layout: dict[str, Any] = {
        key: start[key] for key in ("world_size", "ep_size", "zero_stage", "precision") if key in start
    }
    summary: dict[str, Any] = {"from_step": start["step"], "to_step": trained[-1]["step"] if trained else start["step"]}
    if trained:
        speeds = [record["images_per_second"] for record in trained]
        summary["samples_per_second"] = round(float(np.median(speeds)), 4)
        summary["peak_memory_bytes"] = max(record["peak_memory_bytes"] for record in trained)
    return {**summary, **layout}


def format_report(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    lines = []
    for key, value in report.items():
        if key == "expert_load_per_scale":
            lines.append("expert load, percent (rows: scales, columns: experts)")
            lines += ["    " + " ".join(f"{100 * share:6.1f}" for share in row) for row in value]
        elif key == "starts":
            lines += [f"start {number:<24} {_start_line(start)}" for number, start in enumerate(value, start=1)]
        elif isinstance(value, dict):
            lines.append(key.replace("_", " "))
            lines += [f"    {inner:<26} {_format(inner, item)}" for inner, item in value.items()]
        else:
            lines.append(f"{key.replace('_', ' '):<30} {_format(key, value)}")
    return "\n".join(lines)


def _start_line(start: dict[str, Any]) -> str:
    shown = {key: value for key, value in start.items() if key not in ("from_step", "to_step")}
    facts = [f"{key.replace('_', ' ')} {_format(key, value)}" for key, value in shown.items()]
    return ", ".join([f"steps {start['from_step']} to {start['to_step']}", *facts])


def _format(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return f"{value / 2**20:.0f} MiB"
    if key.endswith("_parameters"):
        return f"{value / 1e6:.2f}M"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
