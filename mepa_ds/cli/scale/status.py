"""`mepa scale status`: how the runs of a study are doing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from mepa_ds import log
from mepa_ds.scaling.running.members import member_of
from mepa_ds.scaling.running.status import format_status, status_rows
from mepa_ds.scaling.study.plan import read_plan, read_study


@dataclass
class StatusOptions:
    """A line for each run: state, step, loss, speed, time left; what it waits for, or why it failed."""

    study: tyro.conf.Positional[Path]
    """Study file, or the output_dir of a planned study."""
    json: bool = False
    """For programs: one object a run."""


def main(argv: list[str]) -> None:
    options = tyro.cli(StatusOptions, prog="mepa scale status", args=argv)
    members = [member_of(row) for row in read_plan(read_study(options.study))]
    log.say(json.dumps(status_rows(members), indent=1) if options.json else format_status(members))
