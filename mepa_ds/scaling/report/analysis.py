"""From the table of a study to its laws: what the report says, as one JSON document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mepa_ds.errors import UserError
from mepa_ds.files import sha256_of_file
from mepa_ds.scaling.laws import Fit, FitOptions, fit_chinchilla, fit_power
from mepa_ds.scaling.laws.data_constrained import fit_data_constrained
from mepa_ds.scaling.laws.moe import ROUTED_EM, ROUTED_ES, fit_joint_moe, fit_routed
from mepa_ds.scaling.report.document import law_of
from mepa_ds.scaling.report.hold_out import compare
from mepa_ds.scaling.report.rows import (
    POINT,
    envelope,
    finished,
    fitted_rows,
    main_kind,
    noise_floor,
    scale_columns,
)

N, D, C = "params_matrix", "tokens", "flops_model"
COUNTS = ("params_matrix", "params_active", "params_total")


@dataclass(frozen=True)
class _Task:
    """One law to fit: its rows, the column of each of its inputs, the column of the loss."""

    fit: Callable[..., Fit]
    rows: pd.DataFrame
    inputs: tuple[str, ...]
    loss: str = "loss"
    settings: Mapping[str, Any] | None = None

    def run(self, options: FitOptions) -> Fit:
        columns = [self.rows[name].to_numpy(float) for name in (*self.inputs, self.loss)]
        return self.fit(*columns, cluster=clusters(self.rows), options=options, **(self.settings or {}))


def clusters(rows: pd.DataFrame) -> Any:
    """Returns a number for each row; runs that differ in their seed alone have the same."""
    return rows.groupby([*POINT, "lr_peak"], dropna=False, sort=False).ngroup().to_numpy()


def analyse(table: pd.DataFrame, laws: tuple[str, ...], options: FitOptions, path: Path) -> dict[str, Any]:
    """Fits the laws of a study to its table and compares them with the runs that no fit has seen.

    Args:
        table: of `collect`.
        laws: of the study file; `power` over the envelope, the laws of scales and experts come besides.
        options: of all fits.
        path: where the table is, for the document.

    Returns:
        As JSON: `laws` (by name, `Fit.to_dict`), `inputs` (the column of each input), `runs` (names, in the order of
        the residuals), `refused` (by name, why there is no such law), `hold_out`, `rolling`, `exponents_by_count`,
        `noise`, `left_out` and `unique_images` (of the largest training set).
    """
    document: dict[str, Any] = {
        "table": str(path),
        "table_sha256": sha256_of_file(path),
        "laws": {},
        "inputs": {},
        "runs": {},
        "refused": {},
        "left_out": left_out(table),
        "unique_images": _largest(table["unique_images"]),
    }
    deviation, freedom = noise_floor(table)
    document["noise"] = {"deviation": deviation, "freedom": freedom}
    for name, task in _tasks(table, laws).items():
        try:
            document["laws"][name] = task.run(options).to_dict()
            document["inputs"][name] = list(task.inputs)
            document["runs"][name] = task.rows["run"].tolist()
        except UserError as error:
            document["refused"][name] = str(error)
    document["hold_out"] = _hold_out(table, document, deviation)
    document["rolling"] = _rolling(table, options, deviation)
    document["exponents_by_count"] = _exponents_by_count(table, options)
    return document


def _tasks(table: pd.DataFrame, laws: tuple[str, ...]) -> dict[str, _Task]:
    rows, experts = fitted_rows(table), finished(table, "fit")
    table_of = table.assign(unique_tokens=table["unique_images"] * table["tokens"] / table["samples"])
    front = envelope(rows)
    known: dict[str, _Task] = {
        "chinchilla": _Task(fit_chinchilla, rows, (N, D)),
        "data": _Task(fit_data_constrained, table_of.loc[rows.index], (N, D, "unique_tokens")),
        "power": _Task(fit_power, front, (C,)),
    }
    tasks = {name: known[name] for name in dict.fromkeys((*laws, "power")) if name in known}
    for column in scale_columns(table):
        tasks[column] = _Task(fit_chinchilla, rows, (N, D), column)
    moe = experts.assign(E=experts["experts"].clip(lower=1))
    if (experts["kind"] == "moe").any():
        same = _of_one_length(moe)
        given = {"Es": ROUTED_ES, "Em": ROUTED_EM}
        tasks["routed"] = _Task(fit_routed, same, (N, "E"), settings=given)
        tasks["joint-moe"] = _Task(fit_joint_moe, moe, ("params_active", "E", D))
    return tasks


def _of_one_length(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the length at which most runs have experts."""
    return rows[rows[D] == rows[rows["kind"] == "moe"][D].mode().iloc[0]]


def left_out(table: pd.DataFrame) -> dict[str, int]:
    """Returns how many rows no law of size and data sees, by reason."""
    kind = main_kind(table)
    reasons = {
        "held out": finished(table, "hold_out"),
        "runs of a sweep of the learning rate": finished(table, "lr"),
        "runs with experts": finished(table, "fit", "moe") if kind == "dense" else table.iloc[:0],
    }
    counts = {reason: len(rows) for reason, rows in reasons.items()}
    counts |= {f"{status}": int(count) for status, count in _without_loss(table).value_counts().items()}
    return {reason: count for reason, count in counts.items() if count}


def _largest(values: pd.Series) -> float | None:
    return float(values.max()) if values.notna().any() else None


def _without_loss(table: pd.DataFrame) -> pd.Series:
    return table.drop(finished(table).index)["status"]


def _hold_out(table: pd.DataFrame, document: dict[str, Any], noise: float | None) -> dict[str, list[dict[str, Any]]]:
    rows = finished(table, "hold_out", main_kind(table))
    if rows.empty:
        return {}
    rows = rows.assign(unique_tokens=rows["unique_images"] * rows["tokens"] / rows["samples"])
    found = {}
    for name in ("chinchilla", "data", "power"):
        if name in document["laws"]:
            inputs = document["inputs"][name]
            found[name] = compare(law_of(document, name), rows, inputs, noise)
    return found


def _rolling(table: pd.DataFrame, options: FitOptions, noise: float | None) -> dict[str, Any]:
    """The runs of the largest size, predicted by a law that saw the smaller ones alone."""
    rows = fitted_rows(table)
    smaller, largest = (rows[rows[N] < rows[N].max()], rows[rows[N] == rows[N].max()])
    try:
        law = _Task(fit_chinchilla, smaller, (N, D)).run(options)
    except UserError as error:
        return {"refused": str(error)}
    return {"law": law.to_dict(), "N": float(rows[N].max()), "runs": compare(law, largest, [N, D], noise)}


def _exponents_by_count(table: pd.DataFrame, options: FitOptions) -> list[dict[str, Any]]:
    """Exponents of the law of size and data, with N counted in each way, and of the best size in C."""
    rows, found = fitted_rows(table), []
    for count in COUNTS:
        try:
            law = fit_chinchilla(rows[count], rows[D], rows["loss"], cluster=clusters(rows), options=options)
        except UserError as error:
            found.append({"N": count, "refused": str(error)})
            continue
        per = _per_weight(rows, count)
        found.append({
            "N": count, "E": law.E, "alpha": law.alpha, "beta": law.beta,
            "intervals": {name: list(law.intervals[name]) for name in ("alpha", "beta") if name in law.intervals},
            "a_6ND": law.a, "a_counted": counted_exponent(law, *per),
        })  # fmt: skip
    return found


def _per_weight(rows: pd.DataFrame, count: str) -> tuple[Any, Any]:
    """log N, and log of counted FLOPs a weight and token, of each size."""
    per = np.log(rows[C] / (rows[count] * rows[D])).groupby(rows[count]).mean()
    return np.log(per.index.to_numpy(float)), per.to_numpy(float)


def counted_exponent(law: Any, log_n: Any, log_per: Any) -> float | None:
    """Returns the exponent of the best N in counted FLOPs, C = k(N) N D with k a power of N over the study's sizes.

    Along one budget log D = log C - (1 + s) log N + constant, s the slope of log k: at the best N the terms of size and
    data have the ratio beta (1 + s) : alpha, and so N grows as C^(beta / (alpha + (1 + s) beta)). None without a slope.
    """
    if len(log_n) < 2 or law.alpha + law.beta <= 0:
        return None
    slope = float(np.polyfit(log_n, log_per, 1)[0])
    return float(law.beta / (law.alpha + (1 + slope) * law.beta))
