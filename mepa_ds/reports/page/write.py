"""Puts the page together: what it says as HTML, what its charts need as one compressed script."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from mepa_ds.errors import UserError
from mepa_ds.files import write_text
from mepa_ds.reports import html
from mepa_ds.reports.page import recipes, sections
from mepa_ds.reports.page.axes import AXES, RunAxes
from mepa_ds.reports.page.charts import Chart, Lines, as_json, charts_of
from mepa_ds.reports.page.experts import expert_load
from mepa_ds.reports.page.library import NOTICE, chart_library
from mepa_ds.reports.page.pictures import run_pictures
from mepa_ds.reports.page.sections import RunOnPage
from mepa_ds.reports.page.tables import run_facts
from mepa_ds.reports.page.timeline import happenings, marks
from mepa_ds.reports.records import RunRecords

_POINTS, _FEWEST_POINTS = 480, 100
_PICTURE_BYTES, _FRAME_BYTES = 1_000_000, 150_000
"""Of all runs together."""
_SCRIPTS = ("state.js", "charts.js", "heatmaps.js", "controls.js")


def write_page(runs: Sequence[RunRecords], path: Path) -> int:
    """Writes the page of one or several runs; returns its size in bytes.

    Raises:
        UserError: the runs are of different kinds, the charts' library is not there, or the page cannot be written.
    """
    kinds = {records.kind for records in runs}
    if len(kinds) > 1:
        first = next(records for records in runs if records.kind == "pretraining")
        other = next(records for records in runs if records.kind == "tokenizer")
        raise UserError(
            f"{first.directory} is a pretraining run and {other.directory} trains a tokenizer: they have nothing to "
            "compare; give runs of one kind"
        )
    library = chart_library()
    ready = [_ready(name, records, len(runs)) for name, records in zip(names_of(runs), runs, strict=True)]
    charts = charts_of([run.lines for run in ready], ready[0].records.kind)
    content = _page(ready, charts, library)
    try:
        write_text(path, content)
    except OSError as error:
        raise UserError(
            f"{path}: the page cannot be written there: {error.strerror or error}; give --out FILE"
        ) from error
    return len(content.encode())


def names_of(runs: Sequence[RunRecords]) -> list[str]:
    """Returns the shortest ends of the runs' paths that tell them apart."""
    parts = [records.directory.absolute().parts for records in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)]  # the same run twice


def _ready(name: str, records: RunRecords, count: int) -> RunOnPage:
    axes, events = RunAxes(records), happenings(records)
    load = expert_load(records, _FRAME_BYTES // count)
    expected = [str(record.get("path")) for record in records.of("samples")]
    return RunOnPage(
        name,
        records,
        records.recipe(),
        axes,
        Lines(records, load.lines),
        events,
        run_facts(records, axes, events),
        load,
        run_pictures(records.directory, expected, _PICTURE_BYTES // count),
    )


def _page(runs: Sequence[RunOnPage], charts: Sequence[Chart], library: bytes) -> str:
    most = max(_POINTS // len(runs), _FEWEST_POINTS)
    differing = recipes.differences([run.name for run in runs], [run.recipe for run in runs])
    data = {
        "axes": {name: AXES[name] for name in AXES if any(name in run.axes.names for run in runs)},
        "charts": [as_json(chart) for chart in charts],
        "runs": [
            {
                "name": run.name,
                "points": run.lines.points([name for chart in charts for name, _ in chart.lines], run.axes, most),
                "marks": marks(run.events, run.axes, float(run.records.steps[-1])),
                "frames": run.load.frames,
                "pictures": {"steps": run.pictures.steps, "x": run.axes.at(np.array(run.pictures.steps, float))},
            }
            for run in runs
        ],
    }
    body = sections.body(runs, charts, differing, most)
    folder = resources.files("mepa_ds.reports.page") / "scripts"
    code = "\n".join((folder / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    scripts = [
        _compressed("library", library),
        _compressed("data", gzip.compress(json.dumps(data, allow_nan=False, separators=(",", ":")).encode(), mtime=0)),
        f'<script type="application/json" id="pictures">{json.dumps([run.pictures.sources for run in runs])}</script>',
        f"<!-- {NOTICE} -->\n<script>\n(() => {{\n{code}\n}})();\n</script>",
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    style = (folder / "page.css").read_text(encoding="utf-8")
    return html.page(f"{title}: report", body + "\n".join(scripts), style)


def _compressed(name: str, content: bytes) -> str:
    return f'<script type="application/gzip" id="{name}">{base64.b64encode(content).decode()}</script>'
