"""`mepa scale report`: figures and one page of a study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from mepa_ds import log
from mepa_ds.scaling.laws import FitOptions
from mepa_ds.scaling.report.hold_out import verdict
from mepa_ds.scaling.report.page import warnings
from mepa_ds.scaling.report.write import write_report
from mepa_ds.scaling.running.collect import collect
from mepa_ds.scaling.study.plan import read_study


@dataclass
class ReportOptions:
    """Collects the table of a study, fits its laws and writes output_dir/report: fits.json, each figure as PNG and SVG,
    and report.html, one page without scripts and without anything from a network. Runs need not all be finished: the
    page names those that are not, and says of a law that cannot be fitted why.

    figures   laws against size and data, IsoFLOP profiles, loss against compute with its envelope, experts ladder,
              residuals, loss by scale, sweeps of the learning rate; those that the study has runs for"""

    study: tyro.conf.Positional[Path]
    """Study file, or the output_dir of a planned study."""
    draws: int = 1000
    """Draws of the bootstrap behind the intervals; 0 makes none, and takes a moment."""


def main(argv: list[str]) -> None:
    options = tyro.cli(ReportOptions, prog="mepa scale report", args=argv)
    study = read_study(options.study)
    table = collect(study)
    report = write_report(study, table, FitOptions(draws=options.draws))
    for sentence in warnings(report.document, table):
        log.say(f"warning: {sentence}")
    for name, found in report.document["hold_out"].items():
        for one in found:
            log.say(f"held out, law {name}: {verdict(one)}")
    laws = ", ".join(report.document["laws"]) or "none"
    log.say(f"{report.page}: {len(report.figures)} figures, laws {laws}")
