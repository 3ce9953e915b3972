"""`mepa scale report`: fits, figures and the page of a study, written to its output_dir."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import mepa_ds
from mepa_ds.errors import UserError
from mepa_ds.files import write_text
from mepa_ds.reports import style
from mepa_ds.safety.reading import read_json_object
from mepa_ds.scaling.fit_files import write_fits
from mepa_ds.scaling.laws import FitOptions
from mepa_ds.scaling.report.analysis import Asked, analyse, study_laws
from mepa_ds.scaling.report.document import FITS_NAME, REPORT_NAME, input_columns, law_of
from mepa_ds.scaling.report.law_figures import compute_figure, laws_figure, residuals_figure
from mepa_ds.scaling.report.page import Drawn, kind_of, report_page
from mepa_ds.scaling.report.rows import finished
from mepa_ds.scaling.report.run_figures import experts_figure, isoflop_figure, scales_figure, sweeps_figure
from mepa_ds.scaling.running.collect import TABLE_NAME
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.directory import PLAN_NAME
from mepa_ds.scaling.study.plan import STUDY_NAME, study_hash

PAGE_NAME = "report.html"


@dataclass(frozen=True)
class Report:
    """What was written."""

    folder: Path
    document: Mapping[str, Any]
    figures: tuple[str, ...]

    @property
    def page(self) -> Path:
        return self.folder / PAGE_NAME


def write_report(study: StudyConfig, table: pd.DataFrame, options: FitOptions) -> Report:
    """Writes fits.json, each figure as PNG and SVG, and report.html to output_dir/report.

    Args:
        study: of which the table is.
        table: of `collect`, which has written it to the study's output_dir.
        options: of all fits.

    Raises:
        UserError: no run has finished. A law that cannot be fitted is no error: the page says why.
    """
    if finished(table).empty:
        raise UserError(
            f"{study.name}: no run has finished, so there is nothing to report; mepa scale status {study.output_dir} "
            "says how they are doing"
        )
    folder = study.output_dir / REPORT_NAME
    asked = Asked(study_laws(table, study.laws), options, budgets=tuple(_budgets(study)), keep_going=True)
    write_fits(folder / FITS_NAME, analyse(table, study.output_dir / f"{TABLE_NAME}.parquet", asked))
    document = json.loads((folder / FITS_NAME).read_text())  # the page shows what the file has
    drawn = []
    with style.drawing():
        for name, title, caption, figure in _figures(study, table, document):
            drawn.append(Drawn(name, title, caption, style.save(figure, folder / name)))
    page = report_page(_facts(study, table), document, table, drawn, _commands(study))
    write_text(folder / PAGE_NAME, page)
    return Report(folder, document, tuple(figure.name for figure in drawn))


def _budgets(study: StudyConfig) -> dict[str, tuple[float, ...]]:
    """The FLOP budgets of each group of runs that has any."""
    return {group: grid.flops for group, grid in study.grids.items() if grid.flops}


def _figures(
    study: StudyConfig, table: pd.DataFrame, document: Mapping[str, Any]
) -> Iterator[tuple[str, str, str, Figure]]:
    """Yields name, title, caption and figure of those that the study has runs for."""
    law, power = (law_of(document, name) for name in ("chinchilla", "power"))
    kind = kind_of(table)
    budgets = _budgets(study)
    bands = "Bands are 95 % intervals of the law itself, without the noise of a run."
    found = (
        ("laws", "Loss against size and data", f"All {kind}, and the law of N and D. {bands}", laws_figure(table, law)),
        (
            "isoflop",
            "IsoFLOP profiles",
            "Loss at each budget of FLOPs. A parabola's minimum is biased even without noise; compare it with the law "
            "of N and D, dotted. A budget whose minimum lies at an end of the sizes has no mark.",
            isoflop_figure(table, budgets, law),
        ),
        (
            "compute",
            "Loss against compute",
            f"All {kind}, by size. The envelope has the points that no cheaper one beats; its power law is the law "
            f"'power'. {bands}",
            compute_figure(table, power, law),
        ),
        (
            "experts",
            "Experts ladder",
            "Loss against the number of routed experts at the same size, length and active experts. Bars are two "
            "deviations between seeds.",
            experts_figure(table, document["noise"]["deviation"]),
        ),
        ("residuals", "Residuals of the law of N and D", _RESIDUALS, _residuals(table, document, law)),
        (
            "scales",
            "Loss by scale",
            "Points are runs, curves the law of N and D of each scale.",
            scales_figure(table, law_of(document, "var")),
        ),
        (
            "learning_rates",
            "Sweeps of the learning rate",
            "Curves: parabolas in the logarithm of the rate. Dotted: their minima, through which the law 'lr' goes.",
            sweeps_figure(table),
        ),
    )
    for name, title, caption, figure in found:
        if figure is not None:
            yield name, title, caption, figure


_RESIDUALS = "A trend in them means that the law misses something; noise alone would keep most within the band."


def _residuals(table: pd.DataFrame, document: Mapping[str, Any], law: Any) -> Figure | None:
    if law is None:
        return None
    entry = document["laws"]["chinchilla"]
    rows = table[table["run"].isin(entry["runs"])]
    return residuals_figure(rows, law, input_columns(law, entry["columns"]), document["noise"]["deviation"])


def _facts(study: StudyConfig, table: pd.DataFrame) -> dict[str, str]:
    counts = ", ".join(f"{count} {status}" for status, count in table["status"].value_counts().items())
    hours = float((table["seconds"] * table["ranks"]).sum()) / 3600
    measured = finished(table)
    versions = sorted(measured["code_version"].dropna().unique())
    facts = {
        "study": study.name,
        "hash of what the runs are": study_hash(study),
        "version of the code": f"report by {mepa_ds.__version__}; runs by {', '.join(versions) or 'unknown'}",
        "runs": f"{len(table)}: {counts}",
        "device-hours really used": f"{hours:.4g}",
        "model FLOPs of the finished runs": f"{measured['flops_model'].sum():.4g}",
    }
    for label, column in (
        ("devices", "device"), ("held-out images", "heldout_images"), ("held-out set", "heldout_hash"),
        ("tokenizer", "tokenizer_hash"), ("scales", "scales"),
    ):  # fmt: skip
        values = sorted({str(value) for value in measured[column].dropna()})
        if values:
            facts[label] = "; ".join(values)
    plan = study.output_dir / PLAN_NAME
    if plan.is_file() and isinstance(needed := _planned_hours(plan), (int, float)):
        facts["device-hours of the plan"] = f"{needed:.4g}"
    return facts


def _planned_hours(plan: Path) -> Any:
    try:
        return read_json_object(plan).get("total_device_hours")
    except (OSError, ValueError) as error:
        raise UserError(f"{plan}: cannot be read ({error}); run mepa scale plan again") from None


def _commands(study: StudyConfig) -> list[str]:
    out = study.output_dir
    return [
        f"mepa scale plan {out / STUDY_NAME}",
        f"mepa scale run {out}",
        f"mepa scale collect {out}",
        f"mepa scale report {out}",
    ]
