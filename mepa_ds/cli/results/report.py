"""`mepa report`: what runs did, as a table, as JSON, and as a page to look at."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.errors import UserError


@dataclass
class ReportOptions:
    """Reads runs' metrics.jsonl: prints a table of each, writes report.json beside it, and one page with curves,
    pictures and what happened. The page is a single file that needs no network. Several runs are overlaid."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """output_dirs of pretraining runs, or of tokenizers' trainings, finished or not."""
    out: Path | None = None
    """Where the page is written. Default: report.html in the run's directory; of several runs, in the working one."""


def main(argv: list[str]) -> None:
    options = tyro.cli(ReportOptions, prog="mepa report", args=argv)
    if not options.runs:
        raise UserError("give the output_dir of a run, or of several: mepa report RUN [RUN ...]")

    from mepa_ds.files import write_json
    from mepa_ds.reports.page.write import write_page
    from mepa_ds.reports.records import read_records
    from mepa_ds.reports.run_report import format_report, report_of

    read = [read_records(run) for run in options.runs]
    for records in read:
        report, path = report_of(records), records.directory / "report.json"
        try:
            write_json(path, report)
        except OSError as error:  # another user's run, say
            log.note(f"warning: {path} cannot be written: {error.strerror}")
        log.say(f"{records.directory}\n" if len(read) > 1 else "", end="")
        log.say(format_report(report))
        for note in records.notes:  # the page has them too
            log.note(f"note: {records.directory}: {note}")
    page = options.out or (read[0].directory / "report.html" if len(read) == 1 else Path("report.html"))
    size = write_page(read, page)
    log.say(f"page: {page} ({size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
