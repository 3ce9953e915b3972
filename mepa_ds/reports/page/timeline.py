"""What happened in a run besides steps: starts, changes of the recipe, what its guards saw."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from mepa_ds.config.changes import changes_in_words
from mepa_ds.reports.page.axes import RunAxes
from mepa_ds.reports.records import RunRecords

MOST_SHOWN = 300
_MARKS = 150
_WORDS = {
    "start": "start",
    "recipe_changed": "recipe changed",
    "damaged_sample": "damaged samples",
    "skipped_step": "bad step",
    "rollback": "rollback",
    "loss_spike": "loss spike",
    "collapsed_experts": "collapsed experts",
    "slow_rank": "slow rank",
    "write_failed": "failed write",
    "damaged_checkpoint": "damaged checkpoint",
}


@dataclass(frozen=True)
class Happening:
    """One event: its step, its kind in words, what it says; `group` is start, change or guard."""

    step: int
    kind: str
    text: str
    group: str


def happenings(records: RunRecords) -> list[Happening]:
    """Returns the events of a run in the order of its log. Scores, pictures and writes are not among them."""
    found, starts = [], 0
    for record in records.events:
        event, step = record["event"], record["step"]
        if event == "start":
            starts += 1
            found.append(Happening(step, f"start {starts}", _start(record), "start"))
        elif event == "recipe_changed":
            changes = record.get("changes") or {}
            text = changes_in_words(changes) if _are_changes(changes) else json.dumps(changes)
            found.append(Happening(step, _WORDS[event], text, "change"))
        elif event == "damaged_sample":
            damage = [str(one) for one in record.get("damage") or []]
            more = f" and {len(damage) - 3} more" if len(damage) > 3 else ""
            text = f"{record.get('count')} replaced by others: {'; '.join(damage[:3])}{more}"
            found.append(Happening(step, _WORDS[event], text, "guard"))
        elif isinstance(record.get("message"), str):
            found.append(Happening(step, _WORDS.get(event, event.replace("_", " ")), record["message"], "guard"))
    return found


def marks(events: list[Happening], axes: RunAxes, end: float) -> dict[str, Any]:
    """Returns the lines of events on charts: places on every axis, group and label.

    Events that no eye could tell apart are one: of each kind at most one in a 150th of the run.
    """
    merged: dict[tuple[str, int], list[Happening]] = {}
    for event in events:
        if event.kind != "start 1":
            kind = "start" if event.group == "start" else event.kind
            merged.setdefault((kind, int(_MARKS * event.step / max(end, 1))), []).append(event)
    ordered = sorted(merged.items(), key=lambda item: item[1][0].step)
    labels = [
        f"{found[0].kind}" + (f" ({len(found)} up to step {found[-1].step})" if len(found) > 1 else "")
        for _, found in ordered
    ]
    steps = np.array([float(found[0].step) for _, found in ordered])
    return {"x": axes.at(steps), "group": [found[0].group for _, found in ordered], "label": labels}


def _start(record: dict[str, Any]) -> str:
    facts = [f"{record[key]} {word}" for key, word in (("world_size", "ranks"), ("device", "")) if key in record]
    facts += [f"{word} {record[key]}" for key, word in
              (("precision", ""), ("ep_size", "ep_size"), ("zero_stage", "ZeRO"), ("branch_from", "branched from"))
              if key in record]  # fmt: skip
    return ", ".join(fact.strip() for fact in facts)


def _are_changes(changes: Any) -> bool:
    return isinstance(changes, dict) and all(isinstance(pair, list) and len(pair) == 2 for pair in changes.values())
