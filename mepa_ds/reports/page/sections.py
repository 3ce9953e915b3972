"""The page from top to bottom. Scripts fill its charts; all numbers and tables are there without them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from mepa_ds.config.yaml12 import Dumper
from mepa_ds.reports import html
from mepa_ds.reports.page.axes import RunAxes
from mepa_ds.reports.page.charts import Chart, Lines
from mepa_ds.reports.page.experts import ExpertLoad
from mepa_ds.reports.page.pictures import Pictures
from mepa_ds.reports.page.recipes import comparison_warnings
from mepa_ds.reports.page.series import WINDOW_SHARE
from mepa_ds.reports.page.tables import RunFacts, events_table, facts_tables
from mepa_ds.reports.page.timeline import MOST_SHOWN, Happening
from mepa_ds.reports.records import RunRecords

Differing = Sequence[tuple[str, list[str]]]
_PICTURES = {"pretraining": "Samples", "tokenizer": "Reconstructions"}


@dataclass
class RunOnPage:
    """One run, read and made ready."""

    name: str
    records: RunRecords
    recipe: dict[str, Any]
    axes: RunAxes
    lines: Lines
    events: list[Happening]
    facts: RunFacts
    load: ExpertLoad
    pictures: Pictures


def body(runs: Sequence[RunOnPage], charts: Sequence[Chart], differing: Differing, most: int) -> str:
    """Returns the page's body without its scripts. `most`: points of a line."""
    kind = runs[0].records.kind
    sections = {name: list(group) for name, group in itertools.groupby(charts, lambda chart: chart.section)}
    parts = [
        _heading(runs, kind),
        html.box(_warnings(runs, differing, kind), "warn"),
        facts_tables([run.name for run in runs], [run.facts for run in runs]),
        _controls(runs),
    ]
    first = next(iter(sections), "")
    for name, group in sections.items():
        extra = _heat_maps(runs) if name == "Experts" else ""
        parts.append(html.section(name, _grid(group), extra))
        if name == first:
            parts.append(_pictures(runs, _PICTURES[kind]))
    if "Experts" not in sections:
        parts.append(html.section("Experts", _heat_maps(runs)))
    parts += [
        html.section("What happened", events_table([(run.name, run.events) for run in runs], MOST_SHOWN)),
        html.section("Differences of the recipes", _differences(runs, differing)),
        html.section("Recipe" if len(runs) == 1 else "Recipes", *(_recipe(run) for run in runs)),
        html.section("How to read this page", *_reading(runs, most)),
    ]
    return "\n".join(part for part in parts if part)


def _heading(runs: Sequence[RunOnPage], kind: str) -> str:
    what = {"pretraining": "Pretraining run", "tokenizer": "Training of a tokenizer"}[kind]
    if len(runs) == 1:
        title, said = runs[0].name, f"{what}, {runs[0].facts.state}"
    else:
        title, said = f"{len(runs)} runs", f"{what}s, overlaid" if kind == "pretraining" else "Tokenizers, overlaid"
    chips = "".join(
        f'<span class="chip"><i data-run="{number}"></i>{html.text(run.name)}</span>' for number, run in enumerate(runs)
    )
    return (
        f'<header><button id="theme" type="button" title="light or dark">◐ theme</button><h1>{html.text(title)}</h1>'
        f'<p class="faint">{html.text(said)}. Written by <code>mepa report</code>.</p>'
        + (f'<p class="chips">{chips}</p>' if len(runs) > 1 else "")
        + "</header>\n<noscript><p>The charts need JavaScript; all tables are here without it.</p></noscript>"
        '<p id="trouble" class="box bad" hidden></p>'
    )


def _warnings(runs: Sequence[RunOnPage], differing: Differing, kind: str) -> Iterator[str]:
    yield from comparison_warnings(differing, kind == "tokenizer")
    for run in runs:
        of = f"{run.name}: " if len(runs) > 1 else ""
        for note in run.records.notes:
            yield f"{of}{note}."
        for name in ("loss", "grad_norm"):
            lost = int((~np.isfinite(run.records.train.get(name, np.zeros(0)))).sum())
            if lost:
                at = int(run.records.steps[~np.isfinite(run.records.train[name])][0])
                yield (
                    f"{of}{name} is not finite in {lost} of {len(run.records.steps)} records, first at step {at:,}: "
                    "its curve has gaps there."
                )
        yield from (of + note for note in run.pictures.notes)


def _controls(runs: Sequence[RunOnPage]) -> str:
    names = [name for name in ("steps", "images", "flops", "hours") if any(name in run.axes.names for run in runs)]
    labels = {"steps": "steps", "images": "images", "flops": "FLOPs", "hours": "hours"}
    radios = "".join(
        f'<label><input type="radio" name="axis" value="{name}"{" checked" if name == "steps" else ""}>'
        f"<span>{labels[name]}</span></label>"
        for name in names
    )
    switches = "".join(
        f'<label><input type="checkbox" id="show-{name}"{" checked" if on else ""}> {label}</label>'
        for name, label, on in (
            ("noise", "noise", True),
            ("extremes", "extremes", True),
            ("events", "events", True),
            ("log", "log scale", False),
        )
    )
    return (
        '<div id="controls"><span class="axes" role="radiogroup" aria-label="horizontal axis">'
        f"{radios}</span>{switches}"
        '<button id="whole" type="button" hidden>whole run</button></div>'
    )


def _grid(charts: Sequence[Chart]) -> str:
    figures = [
        f'<figure class="chart" id="chart-{html.text(chart.id)}"><h3>{html.text(chart.title)}'
        f'<span class="unit">{html.text(chart.unit)}</span></h3><div class="legend"></div><div class="plot"></div>'
        f"<figcaption>{html.text(chart.caption)}</figcaption></figure>"
        for chart in charts
    ]
    return f'<div class="grid">{"".join(figures)}</div>'


def _heat_maps(runs: Sequence[RunOnPage]) -> str:
    having = [(number, run) for number, run in enumerate(runs) if run.load.frames]
    if not having:
        return ""
    number, run = having[0]
    choices = "".join(f'<option value="{number}">{html.text(run.name)}</option>' for number, run in having)
    which = (
        f'<label>run <select id="heat-run">{choices}</select></label>'
        if len(having) > 1
        else f'<input type="hidden" id="heat-run" value="{number}">'
    )
    last = len(run.load.frames["steps"]) - 1 if run.load.frames else 0
    return (
        f'<div class="slider" id="heat">{which}<label>layer <select id="heat-layer"></select></label>'
        f'<label class="long">step <input type="range" id="heat-step" min="0" max="{last}" value="{last}">'
        '<output id="heat-at"></output></label></div><div class="grid">'
        '<figure class="chart heat" id="heat-scale"><h3>Load of experts by scale</h3><div class="plot"></div>'
        "<figcaption>Share of a scale's routed tokens that each expert gets, in the last step of a record; a row of "
        "equal colours is an even load.</figcaption></figure>"
        '<figure class="chart heat" id="heat-layers"><h3>Load of experts by layer</h3><div class="plot"></div>'
        "<figcaption>Share of a layer's routed tokens, over all scales.</figcaption></figure></div>"
        + _left_out(having, [run.load.note for _, run in having])
    )


def _pictures(runs: Sequence[RunOnPage], title: str) -> str:
    having = [(number, run) for number, run in enumerate(runs) if run.pictures.steps]
    if not having:
        return ""
    steps = sorted({step for _, run in having for step in run.pictures.steps})
    figures = "".join(
        f'<figure class="picture"><img data-run="{number}" alt="{html.text(title)} of {html.text(run.name)}">'
        f"<figcaption>{html.text(run.name) + ', ' if len(runs) > 1 else ''}<span></span></figcaption></figure>"
        for number, run in having
    )
    last = len(steps) - 1
    slider = (
        f'<div class="slider"><button type="button" id="picture-play" title="play">▶</button><label class="long">step '
        f'<input type="range" id="picture-step" min="0" max="{last}" value="{last}" data-steps="{json.dumps(steps)}">'
        '<output id="picture-at"></output></label></div>'
    )
    left_out = _left_out(having, [run.pictures.left_out for _, run in having])
    return html.section(title, slider, f'<div class="pictures">{figures}</div>', left_out)


def _left_out(runs: Sequence[tuple[int, RunOnPage]], notes: Sequence[str]) -> str:
    said = [(run.name, note) for (_, run), note in zip(runs, notes, strict=True) if note]
    return "".join(html.paragraph(f"{name}: {note}" if len(runs) > 1 else note, "faint") for name, note in said)


def _differences(runs: Sequence[RunOnPage], differing: Differing) -> str:
    if len(runs) < 2:
        return ""
    if not all(run.recipe for run in runs):
        return html.paragraph("Not every run has a recipe that can be read, see above.", "faint")
    if not differing:
        return html.paragraph("None, apart from where they write.")
    rows = [[html.text(key), *(html.text(value) for value in values)] for key, values in differing]
    return html.table(("key", *(run.name for run in runs)), rows, wide=True)


def _recipe(run: RunOnPage) -> str:
    if not run.recipe:
        return html.paragraph(f"{run.name}: no recipe could be read.", "faint")
    changes = [event for event in run.events if event.group == "change"]
    said = "".join(html.paragraph(f"At step {event.step:,}: {event.text}.") for event in changes)
    text = yaml.dump(run.recipe, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)
    return (
        f"<details><summary>{html.text(run.name)}: resolved.yaml of its last start</summary>"
        f"<pre>{html.text(text)}</pre></details>{said}"
    )


def _reading(runs: Sequence[RunOnPage], most: int) -> Iterator[str]:
    records = max(len(run.records.steps) for run in runs)
    yield html.paragraph(
        f"Line: the mean of a window of a {WINDOW_SHARE}th of the run's records around each one (a record is itself a "
        "mean over the steps since the one before). Noise, the tinted band: 95 % of single records lie this near to "
        "the line by chance, estimated from differences of records one after another. It says nothing of how another "
        "seed would do. Extremes, the paler band: the smallest and the largest record of each bin."
        + (f" Long runs are drawn in {most} bins; no record is outside its bin's extremes." if records > most else "")
    )
    yield html.paragraph(
        "Held-out scores are single measurements, drawn as points. Hours are those of training steps alone: "
        "evaluations, checkpoints and waiting in a queue are not among them, nor steps that were taken again. FLOPs "
        "are the model's own products, forward and backward, without what is computed again. Vertical lines: starts "
        "and changes of the recipe. Ticks at the upper edge: what the guards saw. Drag over a chart to enlarge a part "
        "of the run in all of them."
    )
