"""`mepa scale fit`: laws of a table of runs, with intervals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import tyro

from mepa_ds import log
from mepa_ds.errors import UserError
from mepa_ds.reports.html import short
from mepa_ds.scaling.fit_files import write_fits
from mepa_ds.scaling.fits import LAWS
from mepa_ds.scaling.laws import FITS, FitOptions
from mepa_ds.scaling.report.analysis import Asked, analyse, is_over_envelope
from mepa_ds.scaling.report.document import FITS_NAME, input_columns
from mepa_ds.scaling.report.hold_out import verdict
from mepa_ds.scaling.report.law_sections import named, objective
from mepa_ds.scaling.running.collect import TABLE_NAME, collect
from mepa_ds.scaling.study.plan import read_study
from mepa_ds.scaling.table import read_table

Law = Literal[
    "power", "chinchilla", "data", "isoflop", "routed", "joint-moe", "fine-grained-moe", "var", "lr", "link"
]  # fmt: skip
_COLUMNS = ("n", "d", "c", "loss", "unique", "experts", "granularity", "lr", "score", "x")


@dataclass
class FitCommand:
    """Fits laws to a table of runs and writes fits.json. Prints the parameters with their 95 % intervals, the minimum
    of the objective, how many starts reached it, flags, and what the laws say of runs with the role hold_out, which no
    fit sees.

    laws
      power             L = E + A x^-alpha; of a study's table: x is FLOPs, over the envelope, unless --x says otherwise
      chinchilla        L = E + A N^-alpha + B D^-beta
      data              the same with effective N and D of repeated data
      isoflop           best N = k C^a from the minima of FLOP budgets, beside the surface
      routed, joint-moe, fine-grained-moe   laws of experts
      var               chinchilla for each scale of VAR
      lr                best learning rate = k N^a (D^b), from sweeps
      link              score against reducible loss; needs --e"""

    table: tyro.conf.Positional[Path]
    """A .csv or .parquet with a row a run, or a study's output_dir (its table; collected first if there is none)."""
    law: Annotated[tuple[Law, ...], tyro.conf.arg(metavar="LAW ...")] = ("chinchilla",)
    """Laws to fit, each on its own."""
    n: str | None = None
    """Column of the size [default: params_matrix]."""
    d: str | None = None
    """Column of the tokens [default: tokens]."""
    c: str | None = None
    """Column of the FLOPs [default: flops_model]."""
    loss: str | None = None
    """Column of the loss [default: loss]."""
    unique: str | None = None
    """Column of the unique tokens [default: unique_images, as tokens]."""
    experts: str | None = None
    """Column of the number of experts."""
    granularity: str | None = None
    """Column of the granularity."""
    lr: str | None = None
    """Column of the peak learning rate [default: lr_peak]."""
    score: str | None = None
    """Column of the score, for link [default: fid]."""
    x: str | None = None
    """For power: n, d, c or a column."""
    objective: Literal["huber", "log_ls", "raw_ls", "asymmetric"] = "huber"
    """Summed over rows: Huber or squares of log loss, squares of loss, or Huber that weighs bad runs less."""
    delta: float = 1e-3
    """Where Huber's squares turn into lines, in log loss."""
    draws: int = 1000
    """Draws of the bootstrap; 0 makes no intervals."""
    starts: int = 64
    """Starts of the optimiser, at least 48."""
    seed: int = 0
    """Of the bootstrap."""
    e: float | None = None
    """Pin E, the irreducible loss (VAR's own laws have 5 for the mean, 4.5 for the last scale)."""
    tied: bool = False
    """chinchilla and data: one exponent for size and data."""
    free_experts: bool = False
    """routed and joint-moe: fit Es and Em too, which one table does not identify."""
    hold_out: tuple[str, ...] = ()
    """Runs (names, or numbers of rows) that no fit may see, besides those with the role hold_out."""
    rolling: bool = False
    """chinchilla: predict each size from the smaller ones too."""
    json: Path | None = None
    """Where to write the fits [default: fits.json beside the table]."""


def main(argv: list[str]) -> None:
    options = tyro.cli(FitCommand, prog="mepa scale fit", args=argv)
    path = _table_path(options.table)
    table = _held_out(read_table(path), options.hold_out)
    columns = {key: getattr(options, key) for key in _COLUMNS if getattr(options, key) is not None}
    asked = Asked(
        laws=tuple(dict.fromkeys(options.law)),
        options=FitOptions(
            objective=options.objective,
            delta=options.delta,
            draws=options.draws,
            num_starts=options.starts,
            seed=options.seed,
        ),
        columns=columns,
        settings=_settings(options),
        rolling=options.rolling,
    )
    target = options.json or path.parent / FITS_NAME
    write_fits(target, analyse(table, path, asked))
    log.say(format_fits(json.loads(target.read_text()), table, columns))
    log.say(target)


def _table_path(given: Path) -> Path:
    """The table itself; of a study, the one in its output_dir, collected if there is none."""
    if given.suffix in (".csv", ".parquet"):
        return given
    study = read_study(given)
    path = study.output_dir / f"{TABLE_NAME}.parquet"
    if not path.is_file():
        collect(study)
    return path


def _held_out(table: pd.DataFrame, runs: tuple[str, ...]) -> pd.DataFrame:
    if not runs:
        return table
    names = table["run"].astype(str) if "run" in table else pd.Series([str(k) for k in range(len(table))])
    unknown = sorted(set(runs) - set(names))
    if unknown:
        what = "run" if "run" in table else "number of a row"
        raise UserError(f"--hold-out {' '.join(unknown)}: no such {what} in the table of {len(table)} rows")
    role = table["role"] if "role" in table else pd.Series("fit", index=table.index)
    return table.assign(role=role.mask(names.isin(runs).to_numpy(), "hold_out"))


_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "e": ("power", "chinchilla", "link"),
    "tied": ("chinchilla", "data"),
    "free_experts": ("routed", "joint-moe"),
}
"""The laws that an option belongs to."""


def _settings(options: FitCommand) -> dict[str, dict[str, Any]]:
    """The arguments of each law's fit.

    Raises:
        UserError: an option of none of the laws, or of some of them alone.
    """
    values: dict[str, dict[str, Any]] = {
        "e": {"E": options.e},
        "tied": {"tied": True},
        "free_experts": {"Es": None, "Em": None},
    }
    settings: dict[str, dict[str, Any]] = {}
    for option, laws in _SETTINGS.items():
        if getattr(options, option) in (None, False):
            continue
        if other := [law for law in options.law if law not in laws]:
            raise UserError(
                f"--{option.replace('_', '-')} belongs to {', '.join(laws)}, not to {', '.join(other)}; fit these on "
                "their own"
            )
        for law in options.law:
            settings.setdefault(law, {}).update(values[option])
    return settings


def format_fits(document: Mapping[str, Any], table: pd.DataFrame, columns: Mapping[str, str]) -> str:
    """Returns the laws of a fits.json as a person reads them."""
    lines: list[str] = []
    for name, entry in document["laws"].items():
        over = ", over the envelope" if is_over_envelope(table, name, columns) else ""
        lines += [*_law_lines(name, entry, over), ""]
    deviation = document["noise"]["deviation"]
    if deviation is not None:
        lines.append(f"noise floor: seeds differ by {100 * deviation:.3g} % (standard deviation of log loss)")
    for reason, runs in document["left_out"].items():
        lines.append(f"left out, {reason}: {len(runs)} runs")
    for name, found in document["hold_out"].items():
        lines += [f"held out, law {name}: {verdict(one)}" for one in found]
    for size in document["rolling"].get("sizes", []):
        lines += [f"from smaller sizes: {verdict(one)}" for one in size["runs"]]
    if "refused" in document["rolling"]:
        lines.append(f"no rolling prediction: {document['rolling']['refused']}")
    for count in document["exponents_by_count"]:
        told = f"N = {count['n']}, C {count['c']}: "
        if "refused" in count:
            lines.append(told + count["refused"])
            continue
        ends = f" ({count['a_low']:.3g} to {count['a_high']:.3g})" if "a_low" in count else ""
        exponents = f"alpha {count['alpha']:.4g}, beta {count['beta']:.4g}"
        lines.append(f"{told}{exponents}, best N grows as C^{count['a']:.3g}{ends}")
    return "\n".join([*lines, *(f"note: {note}" for note in document["notes"])])


def _law_lines(name: str, entry: Mapping[str, Any], over: str) -> Iterator[str]:
    law = entry["fit"]
    inputs = ", ".join(input_columns(FITS[law["law"]], entry["columns"]))
    yield f"{name}: {law['num_rows']} runs{over}; inputs {inputs}"
    for key in FITS[law["law"]].parameter_names:
        values = law[key] if isinstance(law[key], list) else [law[key]]
        for k, value in enumerate(values, start=1):
            label = f"{key}_{k}" if isinstance(law[key], list) else key
            ends = law["intervals"].get(label) or law["intervals"].get(key)
            told = f"   {short(ends[0])} to {short(ends[1])}" if ends else ""
            yield f"  {label:<8}{short(value, 6):>12}{told}"
    if law["law"] == "isoflop":
        yield from _other_minima(law)
    if "disagreement" in law:
        yield f"  the scales' laws and the mean's differ by at most {law['disagreement']:.3%}"
    yield f"  {objective(law)}"
    yield from (f"  flag: {named(flag, entry['runs'])}" for flag in law["flags"])


def _other_minima(law: Mapping[str, Any]) -> Iterator[str]:
    """The parabola is biased even without noise, so the other ways to the same exponent stand beside it."""
    akima = law["akima"]
    yield f"  by Akima's splines: k {short(akima['k'], 6)}, a {short(akima['a'], 6)}" if akima else "  no Akima minima"
    if law["surface"]:
        yield f"  by the surface:     k {short(law['surface_k'], 6)}, a {short(law['surface_a'], 6)}"
    else:
        yield "  no surface"


assert set(Law.__args__) == set(LAWS)  # type: ignore[attr-defined]
