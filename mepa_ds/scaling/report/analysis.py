"""From a table of runs to its laws and what they say of runs that they have not seen, as one JSON document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from mepa_ds.errors import UserError
from mepa_ds.files import sha256_of_file
from mepa_ds.scaling.fit_files import VERSION, exponents_by_count
from mepa_ds.scaling.fits import TableFit, fit_table, rolling_table
from mepa_ds.scaling.laws import FitOptions, HeldOut, noise_floor
from mepa_ds.scaling.laws.hold_out import LAWS as PREDICTABLE
from mepa_ds.scaling.laws.moe import ROUTED_EM, ROUTED_ES
from mepa_ds.scaling.report.hold_out import compare, comparison
from mepa_ds.scaling.report.rows import clusters, envelope, finished, main_kind, scale_columns
from mepa_ds.scaling.table import LAWS_WITH_EXPERTS, choose_rows, inputs_of

ROUTED_SETTINGS = {"Es": ROUTED_ES, "Em": ROUTED_EM}


@dataclass(frozen=True)
class Asked:
    """What is fitted to a table, and how.

    Args:
        laws: by name; `power` is of compute over the envelope, unless `columns` says what its x is.
        options: of all fits.
        columns: the table's own names of columns, as `fit_table` takes them.
        settings: arguments of the fits, by law.
        budgets: groups of runs that have FLOP budgets, which isoflop takes; empty: all runs.
        rolling: whether to predict each size from the smaller ones.
        counts: whether to fit the law of size and data with N counted in every way.
        keep_going: a law that cannot be fitted is named in the document instead of raised.
    """

    laws: tuple[str, ...]
    options: FitOptions
    columns: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    budgets: tuple[str, ...] = ()
    rolling: bool = True
    counts: bool = True
    keep_going: bool = False


def analyse(table: pd.DataFrame, path: Path, asked: Asked) -> dict[str, Any]:
    """Fits laws to a table and compares them with the runs that no fit has seen.

    Args:
        table: as `read_table` gives it.
        path: where it is, for the document.

    Returns:
        As JSON: version, table (path, sha256), laws (name -> `TableFit.to_dict`), refused (name -> why there is none),
        hold_out (law -> `comparison` of each run), rolling, exponents_by_count, noise (deviation of log loss between
        seeds, freedom), unique_images (of the largest training set), left_out (of the first law) and notes.

    Raises:
        UserError: as `fit_table`, unless `keep_going`.
    """
    fits: dict[str, TableFit] = {}
    refused: dict[str, str] = {}
    for name in asked.laws:
        try:
            fits[name] = _fit(table, name, asked)
        except UserError as error:
            if not asked.keep_going:
                raise
            refused[name] = str(error)
    noise = noise_of(table)
    document: dict[str, Any] = {
        "version": VERSION,
        "table": {"path": str(path), "sha256": sha256_of_file(path)},
        "laws": {name: fit.to_dict() for name, fit in fits.items()},
        "refused": refused,
        "noise": noise,
        "hold_out": {name: _hold_out(table, fit, noise["deviation"]) for name, fit in fits.items()},
        "unique_images": _largest(table),
        "left_out": _left_out(table, fits),
        "notes": sorted({note for fit in fits.values() for note in fit.notes}),
    }
    document["hold_out"] = {name: found for name, found in document["hold_out"].items() if found}
    has_law = "chinchilla" in asked.laws
    document["rolling"] = _rolling(table, asked) if asked.rolling and has_law else {}
    document["exponents_by_count"] = _counts(table, asked) if asked.counts and has_law and not asked.columns else []
    return document


def study_laws(table: pd.DataFrame, laws: Sequence[str]) -> tuple[str, ...]:
    """Returns the laws of a report: the study's, power over the envelope, and those that the table has runs for."""
    rows = finished(table)
    fitted = rows[rows["role"] == "fit"]
    has_experts = (fitted["kind"] == "moe").any()
    besides = {
        "power": True,
        "var": bool(scale_columns(table)),
        "routed": has_experts,
        "joint-moe": has_experts,
        "lr": (rows["role"] == "lr").any(),
    }
    return tuple(dict.fromkeys([*laws, *(name for name, is_there in besides.items() if is_there)]))


def rows_for(table: pd.DataFrame, law: str) -> pd.DataFrame:
    """Returns the rows that may take part in a law of a study's table.

    Laws without experts see dense runs alone (where there are any); `routed`, which has no data, sees runs of the
    length at which most have experts.
    """
    if not {"kind", "status", "role", "loss", "tokens"} <= set(table):
        return table  # from elsewhere
    if law not in LAWS_WITH_EXPERTS:
        return table[table["kind"] == main_kind(table)]
    moe = finished(table, "fit", "moe")
    if law == "routed" and len(moe):
        return table[table["tokens"] == moe["tokens"].mode().iloc[0]]
    return table


def _fit(table: pd.DataFrame, name: str, asked: Asked) -> TableFit:
    rows, columns = rows_for(table, name), dict(asked.columns)
    settings = dict(asked.settings.get(name, ROUTED_SETTINGS if name == "routed" else {}))
    if name == "isoflop" and asked.budgets:
        rows = rows[rows["group"].isin(asked.budgets)]
    if is_over_envelope(table, name, asked.columns):
        choose_rows(rows)  # refuses rows that do not compare, before one is chosen for its loss
        named = {own: rows[columns[key]] for key, own in (("loss", "loss"), ("c", "flops_model")) if key in columns}
        rows, columns = envelope(finished(rows.assign(**named), "fit")), {"x": "c"}
    return fit_table(rows, name, columns=columns, options=asked.options, **settings)


def is_over_envelope(table: pd.DataFrame, name: str, columns: Mapping[str, str]) -> bool:
    """Whether a law is the one of compute over the envelope: `power` of a study's table, if no x is named."""
    return name == "power" and "x" not in columns and {"flops_model", "role", "status", "kind"} <= set(table)


def noise_of(table: pd.DataFrame) -> dict[str, Any]:
    """Returns the standard deviation of log loss between seeds over all finished runs, and its degrees of freedom."""
    if not {"seed", "status", "loss", "lr_peak"} <= set(table):
        return {"deviation": None, "freedom": 0}
    rows = finished(table)
    if rows.empty:
        return {"deviation": None, "freedom": 0}
    deviation, freedom = noise_floor(rows["loss"], clusters(rows))
    return {"deviation": deviation, "freedom": freedom}


def _hold_out(table: pd.DataFrame, found: TableFit, noise: float | None) -> list[dict[str, Any]]:
    """Of a law that predicts losses: each finished run of role hold_out. `hold_out` rows are in no fit."""
    rows = rows_for(table, found.law)
    if found.law == "power" and found.columns.get("x") == "c":
        return []  # the envelope bounds the losses of runs from below, and does not predict them
    if found.law not in PREDICTABLE or "role" not in rows or not (rows["role"] == "hold_out").any():
        return []
    columns = {key: column for key, column in found.columns.items() if column in rows or key == "x"}
    try:
        held = choose_rows(rows, columns, ("hold_out",))
    except UserError:  # none of them is finished; the page names them
        return []
    inputs = inputs_of(found.law, held.rows, columns)
    measured = inputs.pop("loss")
    return compare(found.fit, list(inputs.values()), measured, held.names, noise)


def _rolling(table: pd.DataFrame, asked: Asked) -> dict[str, Any]:
    """The runs of each size, predicted by a law of size and data that saw the smaller ones alone."""
    rows = rows_for(table, "chinchilla")
    settings = asked.settings.get("chinchilla", {})
    try:
        found = rolling_table(rows, "chinchilla", columns=asked.columns, options=asked.options, **settings)
        names = choose_rows(rows, asked.columns).names
    except UserError as error:
        return {"refused": str(error)}
    return {"sizes": [_compared(held, names) for held in found]}


def _compared(held: HeldOut, names: Sequence[str]) -> dict[str, Any]:
    told = []
    for k, row in enumerate(held.rows):
        ends = (held.low[k], held.high[k]) if held.fit.draws else None
        told.append(comparison(names[row], held.measured[k], held.predicted[k], ends, held.noise_floor))
    return {"N": held.inputs["N"][0], "parameters": held.fit.parameters, "runs": told}


def _counts(table: pd.DataFrame, asked: Asked) -> list[dict[str, Any]]:
    try:
        return exponents_by_count(rows_for(table, "chinchilla"), options=asked.options)
    except UserError as error:
        return [{"n": "params_matrix", "c": "6ND", "refused": str(error)}]


def _largest(table: pd.DataFrame) -> float | None:
    values = table["unique_images"] if "unique_images" in table else pd.Series(dtype=float)
    return float(values.max()) if values.notna().any() else None


def _left_out(table: pd.DataFrame, fits: Mapping[str, TableFit]) -> dict[str, list[str]]:
    """Runs that the first law has not seen, by reason; that of experts comes from here."""
    if not fits:
        return {}
    name, first = next(iter(fits.items()))
    other = table.drop(rows_for(table, name).index)
    reasons = {reason: list(runs) for reason, runs in first.left_out.items()}
    if len(other):
        reasons["of another kind (dense, with experts) or length"] = other["run"].astype(str).tolist()
    return reasons
