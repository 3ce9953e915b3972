"""The numbers of runs side by side: how far, how good, how fast, how large, on what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mepa_ds.reports import html
from mepa_ds.reports.page.axes import RunAxes
from mepa_ds.reports.page.series import final_value
from mepa_ds.reports.page.timeline import Happening
from mepa_ds.reports.records import RunRecords, number_of
from mepa_ds.reports.run_report import report_of
from mepa_ds.runtime.status import read_status

Row = tuple[str, str]
_SCORES = ("fid", "class_agreement", "kid", "precision", "recall", "inception_score", "sfid")


@dataclass(frozen=True)
class RunFacts:
    """What tables say of one run: HTML by label, in groups, and the state of the run in words."""

    groups: dict[str, dict[str, str]]
    state: str


def run_facts(records: RunRecords, axes: RunAxes, events: Sequence[Happening]) -> RunFacts:
    report = report_of(records)
    status = read_status(records.directory)
    start = (records.of("start") or [{}])[-1]
    state = str(status.get("state", "unknown"))
    groups = {
        "How far": _how_far(records, axes, status, start),
        "How good": _how_good(records),
        "How fast": _how_fast(records, report),
        "How large": _how_large(start),
        "On what": _on_what(start, records),
        "What happened": _what_happened(events),
    }
    return RunFacts({name: facts for name, facts in groups.items() if facts}, state)


def facts_tables(names: Sequence[str], facts: Sequence[RunFacts]) -> str:
    """A table a group, a column a run; nothing is left out where one run has it and another has not."""
    parts = []
    for group in dict.fromkeys(name for one in facts for name in one.groups):
        labels = dict.fromkeys(label for one in facts for label in one.groups.get(group, {}))
        rows = [[html.text(label), *(one.groups.get(group, {}).get(label, html.short(None)) for one in facts)]
                for label in labels]  # fmt: skip
        head = (group, *(names if len(names) > 1 else [""]))
        parts.append(f'<div class="wide">{html.table(head, rows)}</div>')
    return f'<div class="tables{" several" if len(names) > 1 else ""}">{"".join(parts)}</div>'


def _how_far(records: RunRecords, axes: RunAxes, status: dict[str, Any], start: dict[str, Any]) -> dict[str, str]:
    steps = int(records.steps[-1])
    planned = status.get("num_steps", start.get("num_steps"))
    found = {"state": html.text(status.get("state", "unknown: no status.json"))}
    if status.get("error"):
        found["error"] = html.text(status["error"])
    found["steps logged"] = f"{steps:,}" + (f" of {planned:,}" if isinstance(planned, int) else "")
    for name, label in (("images", "images"), ("hours", "hours of training"), ("flops", "model FLOPs")):
        if (total := axes.total(name)) is not None:
            found[label] = f"{total:,.0f}" if name == "images" else html.number(total)
            found[label] += f" ({_clock(total)})" if name == "hours" else ""
    if (epoch := records.last("epoch")) is not None:
        found["epochs"] = html.number(epoch)
    return found


def _clock(hours: float) -> str:
    minutes, seconds = divmod(round(3600 * hours), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _how_good(records: RunRecords) -> dict[str, str]:
    found = {}
    names = {"loss": "training loss, last records", "ce": "cross-entropy, last records"}
    for name, label in names.items():
        if name in records.train:
            value, half = final_value(records.train[name])
            found[label] = html.number(value) + ("" if half is None else f" ± {html.number(half, 2)}")
    heldout = records.of("heldout")
    if best := [record for record in heldout if record.get("best")]:
        found["best held-out cross-entropy"] = (
            f"{html.number(number_of(best[-1].get('ce')))} at step {best[-1]['step']:,}"
        )
        found["its accuracy"] = html.number(number_of(best[-1].get("accuracy")))
    if heldout and records.kind == "tokenizer":
        for name in ("psnr", "ssim", "lpips", "codebook_use", "perplexity"):
            if (last_one := number_of(heldout[-1].get(name))) is not None:
                found[f"held-out {name.replace('_', ' ')}, last"] = html.number(last_one)
    if scores := records.of("score"):
        last = scores[-1]
        for name in last:
            if name in _SCORES or name.endswith(".fd"):
                ends = [number_of(last.get(f"{name}_{end}")) for end in ("low", "high")]
                between = "" if None in ends else f" ({html.interval(ends)})"
                found[f"{name}, step {last['step']:,}"] = html.number(number_of(last[name])) + between
    return found


def _how_fast(records: RunRecords, report: dict[str, Any]) -> dict[str, str]:
    found = {}
    if "samples_per_second" in report:
        found["images a second (median of the last start)"] = html.number(report["samples_per_second"])
    if "mfu" in records.train:
        found["MFU (median)"] = f"{100 * float(np.nanmedian(records.train['mfu'])):.1f} %"
    if "peak_memory_bytes" in report:
        found["peak memory"] = f"{report['peak_memory_bytes'] / 2**30:.2f} GiB"
    for label, seconds in (
        ("held-out evaluations", [record.get("seconds") for record in records.of("heldout")]),
        ("scores of images", [record.get("seconds") for record in records.of("score")]),
        ("waits for checkpoints", [record.get("stalled_seconds") for record in records.of("written")]),
    ):
        numbers = [number for second in seconds if (number := number_of(second)) is not None]
        if numbers:
            found[label] = f"{html.number(sum(numbers), 3)} s ({len(numbers)})"
    return found


def _how_large(start: dict[str, Any]) -> dict[str, str]:
    found = {}
    for key in ("total_parameters", "active_parameters", "projector_parameters"):
        if (value := number_of(start.get(key))) is not None:
            found[key.replace("_", " ")] = f'<span title="{value:,.0f}">{value / 1e6:.2f}M</span>'
    if (value := number_of(start.get("step_flops"))) is not None:
        found["model FLOPs of a step"] = html.number(value, 3)
    if (value := number_of(start.get("num_samples"))) is not None:
        found["images an epoch"] = f"{value:,.0f}"
    return found


def _on_what(start: dict[str, Any], records: RunRecords) -> dict[str, str]:
    words = {"device": "device", "world_size": "ranks", "precision": "precision", "ep_size": "ep_size",
             "zero_stage": "ZeRO stage", "branch_from": "branched from"}  # fmt: skip
    found = {word: html.text(start[key]) for key, word in words.items() if key in start}
    if isinstance(versions := start.get("versions"), dict):
        found["software"] = html.text(", ".join(f"{name} {version}" for name, version in versions.items()))
    found["directory"] = html.text(records.directory)
    return found


def _what_happened(events: Sequence[Happening]) -> dict[str, str]:
    starts = sum(event.group == "start" for event in events)
    counts = Counter(event.kind for event in events if event.group != "start")
    found = {"starts": str(starts)} if starts else {}
    return {**found, **{kind: str(number) for kind, number in counts.items()}}


def events_table(runs: Sequence[tuple[str, Sequence[Happening]]], most: int) -> str:
    """All events, run by run; at most `most` of each, the first and the last ones, and how many are not shown."""
    several = len(runs) > 1
    rows: list[list[str]] = []

    def row(name: str, event: Happening, step: str = "") -> list[str]:
        return [
            step or f"{event.step:,}",
            *([html.text(name)] if several else []),
            f'<span class="kind {event.group}">{html.text(event.kind)}</span>',
            f'<span class="long">{html.text(event.text)}</span>',
        ]

    for name, events in runs:
        if len(events) <= most:
            rows += [row(name, event) for event in events]
            continue
        rows += [row(name, event) for event in events[: most // 2]]
        left_out = Happening(
            0, "left out", f"{len(events) - 2 * (most // 2)} events between these, see metrics.jsonl", ""
        )
        rows += [row(name, left_out, "…"), *(row(name, event) for event in events[-(most // 2) :])]
    head = ("step", *(["run"] if several else []), "what", "")
    return f'<div class="events">{html.table(head, rows, wide=True)}</div>' if rows else ""
