"""`mepa report`: what a pretraining run did."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.files import write_json
from mepa_ds.reports.run_report import format_report, run_report


@dataclass
class ReportOptions:
    """Reads a run's metrics.jsonl; prints a table and writes report.json beside it."""

    run: tyro.conf.Positional[Path]
    """output_dir of a pretraining run, finished or not."""


def main(argv: list[str]) -> None:
    options = tyro.cli(ReportOptions, prog="mepa report", args=argv)
    report = run_report(options.run)
    try:
        write_json(options.run / "report.json", report)
    except OSError as error:  # another user's run, say
        log.note(f"warning: {options.run / 'report.json'} cannot be written: {error.strerror}")
    print(format_report(report))


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
