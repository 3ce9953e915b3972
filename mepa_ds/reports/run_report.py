"""What a run did, pretraining or a tokenizer's training, read from its metrics.jsonl alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mepa_ds.reports.records import Column, RunRecords, number_of, read_records


def run_report(run_directory: Path) -> dict[str, Any]:
    """The run's facts, last training scores, best held-out scores, throughput and expert load per scale.

    Facts, throughput and memory are the last start's; `starts` has these of every start, with the steps that it took.
    `expert_load_per_scale` is (scales, experts), the mean over MoE layers of each expert's share of routed tokens at
    the last logged step. For a tokenizer: its last training record and its last held-out scores. Raises UserError for a
    directory without a run, and for a run without a training record.
    """
    return report_of(read_records(run_directory))


def report_of(records: RunRecords) -> dict[str, Any]:
    """The report of a run whose records have been read."""
    return _pretraining(records) if records.kind == "pretraining" else _tokenizer(records)


def _pretraining(records: RunRecords) -> dict[str, Any]:
    recorded = records.of("start")
    facts = {key: value for key, value in recorded[-1].items() if key not in ("event", "step")} if recorded else {}
    starts = _starts(records)
    # An earlier start may have had other ranks.
    of_this_start = starts[-1][1] if starts and starts[-1][1].any() else np.ones(len(records.steps), bool)
    report: dict[str, Any] = {
        **facts,
        "steps": int(records.steps[-1]),
        "epochs": records.last("epoch"),
        **_speed(records, of_this_start),
        "starts": [_summary(start, records, trained) for start, trained in starts],
        "train_ce": records.last("ce"),
        "train_ce_last_scale": records.last("ce_last"),
    }
    if found := [record for record in records.of("heldout") if record.get("best")]:
        best = found[-1]  # the score of the weights in `best`; earlier scores may be of other held-out tokens
        report |= {
            "heldout_ce": best["ce"],
            "heldout_ce_last_scale": best["ce_last"],
            "heldout_accuracy": best["accuracy"],
            "best_step": best["step"],
        }
    if routing := records.routing_records(records.routing[-1:]):
        load_SE = np.mean([layer["load_scale"] for layer in routing[0]["layers"].values()], axis=0)
        report["expert_load_per_scale"] = np.round(load_SE, 4).tolist()
    return report


def _tokenizer(records: RunRecords) -> dict[str, Any]:
    every = np.ones(len(records.steps), bool)
    report: dict[str, Any] = {"steps": int(records.steps[-1])}
    if (samples := records.last("samples")) is not None:
        report["images"] = int(samples)
    report |= _speed(records, every)
    report |= {f"train_{name}": records.last(name) for name in ("loss", "codebook_use", "perplexity")}
    if found := records.of("heldout"):
        names = ("psnr", "ssim", "lpips", "codebook_use", "perplexity", "num_images")
        report |= {f"heldout_{name}": found[-1][name] for name in names if number_of(found[-1].get(name)) is not None}
    return report


def _speed(records: RunRecords, chosen: Column) -> dict[str, Any]:
    """Of the records that are chosen. The median, so that first steps and steps that share the machine hardly count."""
    found: dict[str, Any] = {}
    if len(speeds := _finite(records, "images_per_second", chosen)):
        found["samples_per_second"] = float(np.median(speeds))
    if len(memory := _finite(records, "peak_memory_bytes", chosen)):
        found["peak_memory_bytes"] = int(memory.max())
    return found


def _finite(records: RunRecords, name: str, chosen: Column) -> Column:
    values = records.train.get(name, np.zeros(0))[chosen] if name in records.train else np.zeros(0)
    return values[np.isfinite(values)]


def _starts(records: RunRecords) -> list[tuple[dict[str, Any], Column]]:
    """Each start with a mask of its training records. Records of steps that were taken again are not among them."""
    recorded = records.of("start")
    ends = [*(float(start["step"]) for start in recorded[1:]), np.inf]
    steps = records.steps
    return [(start, (steps > start["step"]) & (steps <= end)) for start, end in zip(recorded, ends, strict=False)]


def _summary(start: dict[str, Any], records: RunRecords, trained: Column) -> dict[str, Any]:
    layout: dict[str, Any] = {
        key: start[key] for key in ("world_size", "ep_size", "zero_stage", "precision") if key in start
    }
    last = int(records.steps[trained][-1]) if trained.any() else start["step"]
    summary: dict[str, Any] = {"from_step": start["step"], "to_step": last}
    speed = _speed(records, trained)
    if "samples_per_second" in speed:
        speed["samples_per_second"] = round(speed["samples_per_second"], 4)
    return {**summary, **speed, **layout}


def format_report(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    lines = []
    for key, value in report.items():
        if value is None:  # no such number in the last record
            continue
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
