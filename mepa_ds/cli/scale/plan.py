"""`mepa scale plan`: what a study would train, cost and tell."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mepa_ds import log
from mepa_ds.command_line.tables import aligned
from mepa_ds.scaling.study.plan import check_directory, make_plan, plan_facts, read_study, write_plan


@dataclass
class PlanOptions:
    """Multiplies a study file out: writes a recipe for each run, a manifest and plan.json to the study's output_dir,
    and prints the table of runs. Refuses runs that do not fit in memory, runs that are the same, and designs that
    cannot determine the study's laws."""

    study: tyro.conf.Positional[Path]
    """Study file; those of recipes/studies/ are found from any directory."""
    dry_run: bool = False
    """Print, write nothing."""
    memory: bool = True
    """Plan the memory of a rank for each different model; takes seconds a model."""
    json: bool = False
    """For programs: plan.json on the standard output."""


def main(argv: list[str]) -> None:
    options = tyro.cli(PlanOptions, prog="mepa scale plan", args=argv)
    study = read_study(options.study)
    check_directory(study)
    plan = make_plan(study, options.memory)
    facts = plan_facts(plan)
    if not options.dry_run:
        write_plan(plan)
    log.say(json.dumps(facts, indent=1) if options.json else format_plan(facts, study.output_dir, options.dry_run))


def format_plan(facts: dict[str, Any], output_dir: Path, dry_run: bool) -> str:
    """Returns the plan as a person reads it."""
    lines = aligned([_HEAD, *(_cells(row) for row in facts["runs"])], left=2)
    total = f"{len(facts['runs'])} runs, {facts['total_flops']:.3g} model FLOPs"
    if facts["total_device_hours"] is not None:
        total += f", {facts['total_device_hours']:.4g} device-hours"
    if facts["total_price"] is not None:
        total += f", price {facts['total_price']:.6g}"
    lines.append(total)
    if expected := facts["expected"]:
        ranges = [f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in expected.get("ranges", {}).items()]
        prior = [f"{name} {value:.3g}" for name, value in expected.get("prior", {}).items()]
        tables = f"{expected['tables']} simulated tables, 95 %"
        lines.append(f"expected ({tables}): {', '.join(ranges)}; the prior has {', '.join(prior)}")
        lines += [f"warning: {flag}" for flag in expected["flags"]]
    lines += [f"warning: {warning}" for warning in facts["warnings"]]
    lines.append("dry run: nothing was written" if dry_run else f"next: mepa scale run {output_dir}")
    return "\n".join(lines)


_HEAD = (
    "run", "role", "N matrix", "active", "steps", "images", "epochs", "peak lr", "FLOPs", "hours", "price", "memory"
)  # fmt: skip


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["run"],
        row["role"],
        _millions(row["params_matrix"]),
        _millions(row["params_active"]),
        str(row["steps"]),
        str(row["samples"]),
        _number(row["epochs"], ".2f"),
        "sweep" if row["waits_for_sweep"] else f"{row['lr_peak']:.2e}",
        f"{row['paid_flops']:.2e}",
        _number(row["device_hours"], ".3g"),
        _number(row["price"], ".4g"),
        _gigabytes(row["memory_bytes"]),
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.4g}M"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f} GB"
