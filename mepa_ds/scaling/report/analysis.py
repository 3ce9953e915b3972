"""From the table of a study to its laws: what the report says, as one JSON document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mepa_ds.errors import UserError
from mepa_ds.files import sha256_of_file
from mepa_ds.scaling.laws import (
    Fit,
    FitOptions,
    HeldOut,
    fit_chinchilla,
    fit_data_constrained,
    fit_isoflop,
    fit_joint_moe,
    fit_lr,
    fit_power,
    fit_routed,
    fit_scales,
    noise_floor,
    rolling,
)
from mepa_ds.scaling.laws.moe import ROUTED_EM, ROUTED_ES
from mepa_ds.scaling.report.document import law_of
from mepa_ds.scaling.report.hold_out import compare, comparison
from mepa_ds.scaling.report.rows import (
    clusters,
    envelope,
    finished,
    fitted_rows,
    main_kind,
    scale_columns,
    sweep_groups,
    tokens_of_scales,
)

N, D, C = "params_matrix", "tokens", "flops_model"
COUNTS = ("params_matrix", "params_active", "params_total")


@dataclass(frozen=True)
class _Task:
    """One law to fit: the rows, the column of each of its inputs, and the call."""

    rows: pd.DataFrame
    inputs: tuple[str, ...]
    fit: Callable[..., Fit]
    """Takes the columns of the inputs, `loss`, `cluster` and `options`."""

    def run(self, options: FitOptions) -> Fit:
        columns = [self.rows[name].to_numpy(float) for name in self.inputs]
        return self.fit(*columns, self.rows["loss"].to_numpy(float), cluster=clusters(self.rows), options=options)


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
    measured = finished(table)
    deviation, freedom = noise_floor(measured["loss"], clusters(measured))
    document["noise"] = {"deviation": deviation, "freedom": freedom}
    for name, task in _tasks(table, laws).items():
        try:
            document["laws"][name] = task.run(options).to_dict()
            document["inputs"][name] = list(task.inputs)
            document["runs"][name] = task.rows["run"].tolist()
        except UserError as error:
            document["refused"][name] = str(error)
    document["hold_out"] = _hold_out(table, document, deviation)
    document["rolling"] = _rolling(table, options)
    document["exponents_by_count"] = _exponents_by_count(table, options)
    return document


def _tasks(table: pd.DataFrame, laws: tuple[str, ...]) -> dict[str, _Task]:
    rows, both = fitted_rows(table), finished(table, "fit")
    repeated = rows.assign(unique_tokens=_unique_tokens(rows))
    moe = both.assign(E=both["experts"].clip(lower=1))
    has_experts, by_scale, sweeps = (both["kind"] == "moe").any(), scale_columns(table), _sweeps(table)
    routed = _of_one_length(moe) if has_experts else moe
    known = {
        "chinchilla": _Task(rows, (N, D), fit_chinchilla),
        "data": _Task(repeated, (N, D, "unique_tokens"), fit_data_constrained),
        "isoflop": _Task(rows, (C, N), partial(_isoflop, rows)),
        "power": _Task(envelope(rows), (C,), fit_power),
        "var": _Task(rows, (N, D), partial(_var, rows, by_scale)),
        "routed": _Task(routed, (N, "E"), partial(fit_routed, Es=ROUTED_ES, Em=ROUTED_EM)),
        "joint-moe": _Task(moe, ("params_active", "E", D), fit_joint_moe),
        "lr": _Task(sweeps, (N, "lr_peak"), partial(_lr, sweeps)),
    }
    besides = {
        "power": True, "var": bool(by_scale), "routed": has_experts, "joint-moe": has_experts, "lr": len(sweeps) > 0
    }  # fmt: skip
    asked = [*laws, *(name for name, is_there in besides.items() if is_there)]
    return {name: known[name] for name in known if name in asked}


def _unique_tokens(rows: pd.DataFrame) -> pd.Series:
    return rows["unique_images"] * rows[D] / rows["samples"]


def _isoflop(rows: pd.DataFrame, *columns: Any, **settings: Any) -> Fit:
    per = float(np.median(rows[C] / (rows[N] * rows[D])))
    return fit_isoflop(*columns, D=rows[D].to_numpy(float), flops_per=per, **settings)


def _var(rows: pd.DataFrame, by_scale: list[str], n: Any, d: Any, _: Any, **settings: Any) -> Fit:
    return fit_scales(n, d, rows[by_scale].to_numpy(float), tokens_of_scales(rows), **settings)


def _lr(rows: pd.DataFrame, *columns: Any, cluster: Any, options: FitOptions) -> Fit:
    del cluster  # a sweep's runs share their seed
    several = rows[D].nunique() > 1
    return fit_lr(*columns, D=rows[D].to_numpy(float) if several else None, options=options)


def _sweeps(table: pd.DataFrame) -> pd.DataFrame:
    """The runs of all sweeps of the main kind."""
    groups = [group for group in sweep_groups(table) if group["kind"].iloc[0] == main_kind(table)]
    return pd.concat(groups) if groups else table.iloc[:0]


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
    rows = rows.assign(unique_tokens=_unique_tokens(rows))
    found = {}
    for name in ("chinchilla", "data", "power"):
        if name in document["laws"]:
            found[name] = compare(law_of(document, name), rows, document["inputs"][name], noise)
    return found


def _rolling(table: pd.DataFrame, options: FitOptions) -> dict[str, Any]:
    """The runs of each size, predicted by a law of size and data that saw the smaller ones alone."""
    rows = fitted_rows(table)
    columns = {"N": rows[N], "D": rows[D], "loss": rows["loss"]}
    try:
        found = rolling("chinchilla", columns, cluster=clusters(rows), options=options)
    except UserError as error:
        return {"refused": str(error)}
    return {"sizes": [_compared(held, rows["run"].tolist()) for held in found]}


def _compared(held: HeldOut, runs: list[str]) -> dict[str, Any]:
    told = []
    for k, row in enumerate(held.rows):
        ends = (held.low[k], held.high[k]) if held.fit.draws else None
        told.append(comparison(runs[row], held.measured[k], held.predicted[k], ends, held.noise_floor))
    return {"N": held.inputs["N"][0], "parameters": held.fit.parameters, "runs": told}


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
