"""The file of fits that reports and predictions are made from, and the exponents under every way of counting."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mepa_ds.errors import UserError
from mepa_ds.safety.reading import read_json
from mepa_ds.scaling.fits import TableFit, fit_table, hold_out_table, rolling_table
from mepa_ds.scaling.laws import ChinchillaFit, FitOptions, fit_chinchilla
from mepa_ds.scaling.laws.hold_out import LAWS as PREDICTABLE
from mepa_ds.scaling.table import choose_rows, column_numbers, inputs_of, read_table

COUNTS = ("params_matrix", "params_active", "params_total")
VERSION = 1


def exponents_by_count(table: pd.DataFrame, *, options: FitOptions | None = None) -> list[dict[str, Any]]:
    """The exponents of the Chinchilla law under every count of weights and of compute, a row each.

    N is `params_matrix`, `params_active` or `params_total` (those that the table has). C is 6ND, or counted: FLOPs a
    token then grow as N^s, s by least squares over the runs, and N* grows as C^a with a = beta / (alpha + s beta).

    Returns:
        Rows with n, c ("6ND" or "counted"), alpha, beta, s, a, a_low, a_high (95 %, s held), E and objective; a row
        whose fit is refused has `refused` with the message instead.
    """
    options = options or FitOptions()
    chosen = choose_rows(table, law="chinchilla")
    rows: list[dict[str, Any]] = []
    for count in (name for name in COUNTS if name in chosen.rows.columns):
        given = inputs_of("chinchilla", chosen.rows, {"n": count})
        cluster = None if chosen.cluster is None else np.array(chosen.cluster)
        try:
            fit = fit_chinchilla(**given, cluster=cluster, options=options)
        except UserError as error:
            rows.append({"n": count, "c": "6ND", "refused": str(error)})
            continue
        rows.append(_exponents(fit, count, "6ND", 1.0))
        if "flops_model" in chosen.rows.columns:
            per_token = np.log(column_numbers(chosen.rows, "flops_model") / given["D"])
            growth = float(np.polyfit(np.log(given["N"]), per_token, 1)[0])
            rows.append(_exponents(fit, count, "counted", growth))
    return rows


def _exponents(fit: ChinchillaFit, count: str, compute: str, growth: float) -> dict[str, Any]:
    row: dict[str, Any] = {"n": count, "c": compute, "alpha": fit.alpha, "beta": fit.beta, "s": growth}
    row |= {"a": fit.beta / (fit.alpha + growth * fit.beta), "E": fit.E, "objective": fit.objective}
    if fit.draws:
        alpha, beta = (np.asarray(fit.draws[name]) for name in ("alpha", "beta"))
        tail = fit.tail()
        with np.errstate(all="ignore"):
            drawn = beta / (alpha + growth * beta)
        low, high = np.nanquantile(drawn, [tail, 1 - tail], method="median_unbiased")
        row |= {"a_low": float(low), "a_high": float(high)}
    return row


def fit_file(
    path: str | Path,
    laws: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    options: FitOptions | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Fits laws to a table's file and gathers all that `write_fits` writes.

    Args:
        settings: arguments of the fits, by law.

    Returns:
        table (path, sha256), laws (law -> `TableFit.to_dict`), exponents_by_count, hold_out and rolling (law ->
        `HeldOut.to_dict`, or a list of them), left_out, notes: what could not be done, as sentences.

    Raises:
        UserError: as `fit_table`, for any of the laws.
    """
    table, settings = read_table(path), settings or {}
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    fits = {law: fit_table(table, law, columns=columns, options=options, **settings.get(law, {})) for law in laws}
    notes: list[str] = []
    counted: list[dict[str, Any]] = []
    held: dict[str, Any] = {}
    rolled: dict[str, Any] = {}
    if "chinchilla" in laws and not columns:
        counted = exponents_by_count(table, options=options)
    for law in (law for law in laws if law in PREDICTABLE):
        given: dict[str, Any] = {"columns": columns, "options": options, **settings.get(law, {})}
        if "role" in table.columns and (table["role"] == "hold_out").any():
            try:
                held[law] = hold_out_table(table, law, **given).to_dict()
            except UserError as error:
                notes.append(f"{law}: no hold-out: {error}.")
        try:
            rolled[law] = [found.to_dict() for found in rolling_table(table, law, **given)]
        except UserError as error:
            notes.append(f"{law}: no rolling prediction: {error}.")
    first = next(iter(fits.values()), None)
    return {
        "version": VERSION,
        "table": {"path": str(path), "sha256": digest},
        "laws": {law: fit.to_dict() for law, fit in fits.items()},
        "exponents_by_count": counted,
        "hold_out": held,
        "rolling": rolled,
        "left_out": first.to_dict()["left_out"] if first else {},
        "notes": notes,
    }


def write_fits(path: str | Path, fits: Mapping[str, Any]) -> None:
    """Writes what `fit_file` gave as JSON, all numbers in full; the file appears when it is complete."""
    from mepa_ds.files import write_json  # brings torch, which fitting does not need

    write_json(Path(path), dict(fits))


def read_fits(path: str | Path) -> dict[str, Any]:
    """What `write_fits` wrote, with each law's entry under `laws` as a `TableFit`.

    Raises:
        UserError: no such file, no JSON, or no fits of this version.
    """
    path = Path(path)
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); `mepa scale fit` writes it") from None
    is_fits = isinstance(data, dict) and data.get("version") == VERSION and isinstance(data.get("laws"), dict)
    if not is_fits:
        raise UserError(f"{path}: these are no fits of version {VERSION}; fit the table again")
    return data | {"laws": {law: TableFit.from_dict(entry) for law, entry in data["laws"].items()}}
