"""`mepa scale status`: a line for each run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mepa_ds.scaling.running.members import Member


def status_rows(members: Iterable[Member]) -> list[dict[str, Any]]:
    """Returns state, step, loss, speed, time left and error of each run, as JSON has it."""
    return [
        {
            "run": member.name,
            "role": member.row["role"],
            "state": member.state,
            "step": member.step,
            "steps": member.row["steps"],
            **{key: member.facts.get(key) for key in ("loss", "images_per_second", "seconds_left", "error")},
        }
        for member in members
    ]


def format_status(members: Iterable[Member]) -> str:
    """Returns the lines, and a last one that counts the states."""
    found = list(members)
    width = max(len(member.name) for member in found)
    lines = [_line(member, width) for member in found]
    counts: dict[str, int] = {}
    for member in found:
        counts[member.state] = counts.get(member.state, 0) + 1
    lines.append(f"{len(found)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return "\n".join(lines)


def _line(member: Member, width: int) -> str:
    facts, parts = member.facts, []
    if member.state in ("running", "stopped") and "loss" in facts:
        parts.append(f"loss {facts['loss']}" if isinstance(facts["loss"], str) else f"loss {facts['loss']:.4f}")
    if member.state == "running" and "images_per_second" in facts:
        left = int(facts["seconds_left"])
        parts.append(
            f"{facts['images_per_second']:.0f} images/s, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        )
    if member.state in ("failed", "diverged") and facts.get("error"):
        parts.append(" ".join(str(facts["error"]).split()))
    if member.state == "waiting":
        trunk = member.row["branches_off"]
        parts.append(f"for a checkpoint of {trunk}" if trunk else "for the sweep of the learning rate")
    step = f"{member.step}/{member.row['steps']}"
    return f"{member.name:<{width}}  {member.state:<9} {step:>13}  {'  '.join(parts)}".rstrip()
