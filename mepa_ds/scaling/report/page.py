"""The page of a report. Everything on it is printed from the document of the fits and from the table of runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mepa_ds.reports import html
from mepa_ds.scaling.report.hold_out import verdict
from mepa_ds.scaling.report.law_sections import counts, laws, named
from mepa_ds.scaling.report.rows import finished, main_kind, unfinished

_RUN_COLUMNS = (
    "run", "role", "status", "seed", "kind", "params_matrix", "params_active", "tokens", "epochs", "batch", "lr_peak",
    "flops_model", "loss", "loss_last", "accuracy", "train_loss", "seconds", "device",
)  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A figure on the page."""

    name: str
    title: str
    caption: str
    svg: str


def report_page(
    facts: Mapping[str, str],
    document: Mapping[str, Any],
    table: pd.DataFrame,
    figures: Sequence[Drawn],
    commands: Sequence[str],
) -> str:
    """Returns the whole page.

    Args:
        facts: of the study, by what they are called.
        document: of `analyse`, as its file has it.
        table: of `collect`.
        figures: in their order.
        commands: which reproduce it.
    """
    name = facts["study"]
    body = [
        f"<h1>Scaling study {html.text(name)}</h1>",
        html.section("First", html.box(warnings(document, table), "warn"), *_verdicts(document)),
        html.section("Study", html.table(("", ""), [(html.text(k), html.text(v)) for k, v in facts.items()])),
        html.section("Laws", *laws(document)),
        html.section("Exponents under every count", *counts(document)),
        html.section("Sizes predicted from the smaller ones", *_rolling(document)),
        html.section("Figures", *(_figure(figure) for figure in figures)),
        html.section("Runs without a final loss", _unfinished(table)),
        html.section("Runs", _runs(table)),
        html.section("How to reproduce it", "<pre>" + html.text("\n".join(commands)) + "</pre>"),
    ]
    return html.page(f"Scaling study {name}", "\n".join(body))


def warnings(document: Mapping[str, Any], table: pd.DataFrame) -> list[str]:
    """Returns the sentences that a reader must see before the numbers."""
    return list(_warnings(document, table))


def _warnings(document: Mapping[str, Any], table: pd.DataFrame) -> Iterator[str]:
    without = unfinished(table)
    for status, rows in without.groupby("status", sort=True):
        yield f"{len(rows)} of {len(table)} runs {_HAVE.get(str(status), 'are ' + str(status))}: {_some(rows['run'])}."
    versions = sorted(finished(table)["code_version"].dropna().unique())
    if len(versions) > 1:
        yield f"The runs are of different versions of the code: {', '.join(versions)}."
    for name, message in document["refused"].items():
        yield f"No law {name}: {message.removeprefix(f'{name}: ')}."
    for name, law in document["laws"].items():
        for flag in law["fit"]["flags"]:
            yield f"Law {name}: {named(flag, law['runs'])}"
    yield from document["notes"]
    if document["noise"]["deviation"] is None:
        yield "No run was repeated with another seed, so nothing says how much of a difference is noise."
    if not document["hold_out"]:
        yield "No finished run is held out, so the laws' predictions are not checked beyond the runs they have seen."


_HAVE = {"failed": "have failed", "diverged": "have diverged", "running": "are not finished"}


def _some(names: Any, most: int = 12) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def _verdicts(document: Mapping[str, Any]) -> Iterator[str]:
    for name, found in document["hold_out"].items():
        for one in found:
            kind = {True: "good", False: "bad", None: "warn"}[one["right"]]
            yield html.box([f"Held out, law {name}: {verdict(one)}"], kind)


def _rolling(document: Mapping[str, Any]) -> Iterator[str]:
    rolled = document["rolling"]
    if not rolled:
        return
    if "refused" in rolled:
        yield html.box([f"{rolled['refused']}."], "warn")
        return
    for size in rolled["sizes"]:
        yield f"<h3>N = {html.number(size['N'])}</h3>"
        good = all(one["right"] for one in size["runs"])
        yield html.box([verdict(one) for one in size["runs"]], "good" if good else "bad")


def _figure(figure: Drawn) -> str:
    return (
        f'<figure class="figure" id="figure-{html.text(figure.name)}"><h3>{html.text(figure.title)}</h3>{figure.svg}'
        f"<figcaption>{html.text(figure.caption)}</figcaption></figure>"
    )


def _unfinished(table: pd.DataFrame) -> str:
    rows = unfinished(table)
    if rows.empty:
        return html.paragraph("None: every run of the plan has finished.")
    cells = [[html.text(row[name]) for name in ("run", "role", "group", "status")] for _, row in rows.iterrows()]
    return html.table(("run", "role", "group", "status"), cells)


def _runs(table: pd.DataFrame) -> str:
    names = [name for name in _RUN_COLUMNS if name in table]
    cells = [[_cell(row[name]) for name in names] for _, row in table.iterrows()]
    return html.table(names, cells, wide=True)


def _cell(value: Any) -> str:
    if value is None or value != value:  # NaN: not measured
        return html.short(None)
    return html.text(value) if isinstance(value, (str, bool)) else html.number(value, 5)


def kind_of(table: pd.DataFrame) -> str:
    """Returns what the laws of size and data are fitted to, for captions."""
    return {"dense": "dense runs", "moe": "runs with experts"}[main_kind(table)]
