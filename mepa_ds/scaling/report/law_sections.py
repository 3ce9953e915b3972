"""The sections of the page on laws, printed from the document of the fits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mepa_ds.reports import html
from mepa_ds.scaling.laws import FITS
from mepa_ds.scaling.report.document import input_columns

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


def named(flag: str, runs: Sequence[str]) -> str:
    """Returns a flag that counts rows with the names of the runs in their place."""
    if "by row" not in flag:
        return flag
    return re.sub(
        r"\b(\d+) \(", lambda m: f"{runs[int(m[1])]} (" if int(m[1]) < len(runs) else m[0], flag.replace(", by row", "")
    )


def laws(document: Mapping[str, Any]) -> Iterator[str]:
    """Yields the HTML of all laws, and in the place of a law that could not be fitted the reason."""
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


def counts(document: Mapping[str, Any]) -> Iterator[str]:
    """Yields the HTML of the exponents under every count of weights and of compute."""
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
