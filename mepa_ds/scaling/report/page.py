"""The page of a report. Everything on it is printed from the document of the fits and from the table of runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mepa_ds.scaling.laws import FITS
from mepa_ds.scaling.report import html
from mepa_ds.scaling.report.document import input_columns
from mepa_ds.scaling.report.hold_out import verdict
from mepa_ds.scaling.report.rows import finished, main_kind, unfinished

FORMULAS = {
    "chinchilla": ("Size and data", "L = E + A N^-alpha + B D^-beta", "2203.15556"),
    "data": ("Repeated data", "L = E + A N'^-alpha + B D'^-beta, N' and D' effective", "2305.16264"),
    "power": ("Compute, over the envelope", "L = E + A C^-alpha", ""),
    "isoflop": ("IsoFLOP minima", "best N = k C^a, from the minima of each budget", "2203.15556"),
    "routed": ("Experts", "log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d", "2202.01169"),
    "joint-moe": (
        "Experts, size and data",
        "L = a Ê^delta N^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê) + c",
        "2502.05172",
    ),
    "var": ("Scales", "one law of size and data a scale", ""),
    "lr": ("Learning rate", "best peak rate = k N^a, or k N^a D^b, from the minima of the sweeps", ""),
}
COUNT_NAMES = {
    "params_matrix": "matrix weights (the laws' N)",
    "params_active": "active parameters",
    "params_total": "all parameters",
}
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
        html.section("Laws", *_laws(document)),
        html.section("Exponents under every count", *_counts(document)),
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
        yield f"No law {name}: {message}."
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


def named(flag: str, runs: Sequence[str]) -> str:
    """Returns a flag that counts rows with the names of the runs in their place."""
    if "by row" not in flag:
        return flag
    return re.sub(
        r"\b(\d+) \(", lambda m: f"{runs[int(m[1])]} (" if int(m[1]) < len(runs) else m[0], flag.replace(", by row", "")
    )


def _verdicts(document: Mapping[str, Any]) -> Iterator[str]:
    for name, found in document["hold_out"].items():
        for one in found:
            kind = {True: "good", False: "bad", None: "warn"}[one["right"]]
            yield html.box([f"Held out, law {name}: {verdict(one)}"], kind)


def _laws(document: Mapping[str, Any]) -> Iterator[str]:
    noise = document["noise"]
    if noise["deviation"] is not None:
        yield (
            f"<p>Noise floor: seeds differ by {html.number(100 * noise['deviation'])} % of the loss (standard "
            f"deviation of log loss, {noise['freedom']} degrees of freedom).</p>"
        )
    if left_out := document["left_out"]:
        reasons = ", ".join(f"{reason} ({len(runs)})" for reason, runs in left_out.items())
        yield html.paragraph(f"Runs that the first law has not seen: {reasons}.", "faint")
    for name in (*document["laws"], *document["refused"]):
        title, formula, paper = FORMULAS[name]
        link = f' (<a href="https://arxiv.org/abs/{paper}">arXiv {paper}</a>)' if paper else ""
        yield f'<h3 id="law-{html.text(name)}">{html.text(title)}: {html.text(name)}</h3>'
        yield f"<p><code>{html.text(formula)}</code>{link}</p>"
        if name in document["refused"]:
            yield html.box([f"{document['refused'][name]}."], "bad")
        else:
            yield _law(document, name)


def _law(document: Mapping[str, Any], name: str) -> str:
    entry = document["laws"][name]
    law = entry["fit"]
    inputs = ", ".join(input_columns(FITS[law["law"]], entry["columns"]))
    about = f"{law['num_rows']} runs; inputs: {inputs}; {objective(law)}"
    flags = [named(flag, entry["runs"]) for flag in law["flags"]]
    parts = [_scales(law) if name == "var" else _parameters(law), html.paragraph(about, "faint"), *_details(law)]
    return "\n".join([*parts, html.box(flags, "warn")])


def objective(law: Mapping[str, Any]) -> str:
    """Returns the objective of a fit, its minimum, and how many starts came to it, in words."""
    if law["law"] in ("isoflop", "lr", "lr-data"):
        return f"a line through the logarithms of the minima, squares of the rest: {2 * law['objective']:.6g}"
    return (
        f"objective {law['options']['objective']}, summed: {law['objective']:.9g}; {law['starts_at_optimum']} of "
        f"{law['num_starts']} starts reached it"
    )


def _parameters(law: Mapping[str, Any]) -> str:
    keys = FITS[law["law"]].parameter_names
    rows = [(html.text(key), html.number(law[key]), html.interval(law["intervals"].get(key))) for key in keys]
    return html.table(("parameter", "value", f"{100 * law['options']['level']:g} % interval"), rows)


def _scales(law: Mapping[str, Any]) -> str:
    keys = FITS["var"].parameter_names
    rows = []
    for scale in range(len(law["E"])):
        cells = [html.text(f"scale {scale + 1}"), html.number(law["tokens_of_scale"][scale])]
        for key in keys:
            ends = law["intervals"].get(f"{key}_{scale + 1}") or law["intervals"].get(key)
            cells.append(f"{html.number(law[key][scale])}<br><small>{html.interval(ends, 3)}</small>")
        rows.append(cells)
    share = html.number(100 * law["disagreement"])
    told = f"<p>The scales' token-weighted sum and the law of the mean differ by {share} % at most.</p>"
    return html.table(("", "tokens", *keys), rows) + told


def _details(law: Mapping[str, Any]) -> Iterator[str]:
    """What minima a law goes through, and IsoFLOP's other routes."""
    if law["law"] == "isoflop":
        rows = [("parabolas", html.number(law["a"]), html.interval(law["intervals"].get("a")))]
        if law["akima"]:
            ends = law["akima"]["intervals"].get("a")
            rows.append(("Akima's splines", html.number(law["akima"]["a"]), html.interval(ends)))
        rows.append(("the surface L(N, D)", html.number(law["surface_a"]), html.short(None)))
        yield html.table(("a by", "value", "interval"), rows)
    if law.get("minima"):
        at = "C" if law["law"] == "isoflop" else "at"
        cells = [
            (
                " ".join(html.number(value) for value in one["at"]),
                html.number(one["place"]),
                html.interval((one["low"], one["high"])),
                html.text(one["why"] or "used"),
            )
            for one in law["minima"]
        ]
        yield html.table((at, "minimum", "sampled", ""), cells)


def _counts(document: Mapping[str, Any]) -> Iterator[str]:
    rows, messages = [], []
    for count in document["exponents_by_count"]:
        if "refused" in count:
            messages.append(f"{count['n']}: {count['refused']}.")
            continue
        cells = [html.number(count[key]) for key in ("E", "alpha", "beta", "a")]
        ends = html.interval((count["a_low"], count["a_high"]), 3) if "a_low" in count else html.short(None)
        rows.append((html.text(COUNT_NAMES[count["n"]]), html.text(count["c"]), *cells, ends))
    if rows:
        yield html.table(("N is", "C is", "E", "alpha", "beta", "a", "95 % interval of a"), rows)
        yield html.paragraph("a: the best size grows as C^a. The law is the one of size and data.", "faint")
    yield html.box(messages, "bad")


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
        f'<figure id="figure-{html.text(figure.name)}"><h3>{html.text(figure.title)}</h3>{figure.svg}'
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
