"""Tables of runs: read, checked, and cut down to the rows that one fit may use.

`mepa scale collect` writes such tables (one row a run); tables from elsewhere need columns for the law's inputs alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mepa_ds.errors import UserError

Array = NDArray[np.float64]
COLUMNS: Mapping[str, str] = {
    "n": "params_matrix",
    "d": "tokens",
    "c": "flops_model",
    "loss": "loss",
    "unique": "unique_images",
    "experts": "experts",
    "granularity": "granularity",
    "lr": "lr_peak",
    "score": "fid",
}
"""Which column each input of a law is read from, where the user names no other."""
LAWS_WITH_EXPERTS = ("routed", "joint-moe", "fine-grained-moe")
COMPARABLE = ("tokenizer_hash", "heldout_hash", "scales")
"""Losses of rows that differ in one of these do not compare."""
IDENTITY = (
    "kind", "depth", "width", "experts", "top_k", "shared", "expert_hidden", "granularity", "params_total", "samples",
    "unique_images", "batch", "steps", "lr_peak", "warmup", "schedule", "cooldown", "weight_decay",
)  # fmt: skip
"""What makes two runs the same run but for their seed."""

_MOST_CELLS = 5_000_000
"""Of a table: 10 000 runs with 500 columns."""
_MOST_TABLE_BYTES = 1 << 27


@dataclass(frozen=True)
class Chosen:
    """The rows of one fit.

    Attributes:
        rows: the part of the table, in its order.
        names: a name a row: its run, or its number in the table, from 0.
        cluster: a label a row, the same for runs that differ in their seed alone; None where the table has no seeds.
        left_out: of each reason, the names of the rows that it leaves out.
        notes: sentences on what looks odd.
    """

    rows: pd.DataFrame
    names: tuple[str, ...]
    cluster: tuple[int, ...] | None
    left_out: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = field(default=())


def read_table(path: str | Path) -> pd.DataFrame:
    """A table of runs from a .csv or .parquet file.

    Raises:
        UserError: no such file, another suffix, a file that cannot be read as what its suffix says, no rows.
    """
    path = Path(path)
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise UserError(f"{path}: a table is a .csv or .parquet file; give one of these")
    if not path.is_file():
        raise UserError(f"{path}: no such file; `mepa scale collect` writes a study's table")
    try:
        _check_extent(path)
        table = readers[path.suffix](path)
    except Exception as error:  # pandas and pyarrow raise many kinds, all of a damaged file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]} ({first}); write the table anew") from None
    renamed = [name for name in table.columns if re.fullmatch(r".+\.\d+", str(name)) and path.suffix == ".csv"]
    twice = [name for name in renamed if str(name).rpartition(".")[0] in table.columns]
    if twice:
        raise UserError(
            f"{path}: the column {str(twice[0]).rpartition('.')[0]!r} is there twice; leave one of them out"
        )
    if table.empty:
        raise UserError(f"{path}: the table has no rows; collect a study with finished runs")
    return table


def _check_extent(path: Path) -> None:
    """Raises ValueError for what no table of runs has: a Parquet file of some bytes can have any number of rows."""
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_metadata

        facts = read_metadata(path)
        groups = (facts.row_group(number) for number in range(min(facts.num_row_groups, _MOST_CELLS)))
        cells, size = facts.num_rows * facts.num_columns, sum(group.total_byte_size for group in groups)
    else:
        size = path.stat().st_size
        with open(path, "rb") as file:
            columns = file.readline(_MOST_TABLE_BYTES).count(b",") + 1
            lines = 1 + sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 20), b""))
        cells = columns * lines
    if size > _MOST_TABLE_BYTES or cells > _MOST_CELLS:
        raise ValueError(f"{cells} cells, {size} bytes: up to {_MOST_CELLS} and {_MOST_TABLE_BYTES} are read")


def choose_rows(
    table: pd.DataFrame,
    columns: Mapping[str, str] | None = None,
    roles: Sequence[str] = ("fit",),
    law: str | None = None,
) -> Chosen:
    """The rows that one fit may use: finished, of one of the roles, of one kind of model, comparable, complete.

    Args:
        columns: where to find the inputs, as in `COLUMNS`.
        roles: what rows are for; a table without a column `role` is used whole.
        law: what is to be fitted. A law without a term of experts takes dense runs alone, where the table has both
            kinds: at the same N, experts lower the loss. None: all kinds.

    Raises:
        UserError: rows of several tokenizers, held-out sets or scale schedules; losses of other weights than the last;
            runs that say finished and were cut short; the same run twice; no rows left.
    """
    names = _names(table)
    left_out: dict[str, tuple[str, ...]] = {}
    use = np.ones(len(table), bool)
    for column, allowed in (("status", ("finished",)), ("role", tuple(roles)), ("kind", ("dense",))):
        if column not in table.columns:
            continue
        values = texts(table[column])
        if column == "kind" and (law is None or law in LAWS_WITH_EXPERTS or "dense" not in values[use]):
            continue
        for value in sorted({str(value) for value in values[use]} - set(allowed)):
            out = use & (values == value)
            left_out[f"{column} {value}"] = tuple(names[out].tolist())
            use &= ~out
    if not use.any():
        told = "; ".join(f"{reason}: {len(rows)}" for reason, rows in left_out.items())
        raise UserError(f"table: none of {len(table)} rows can be used ({told}); finish runs of role {'/'.join(roles)}")
    rows = table[use]
    chosen = names[use]
    _check_comparable(rows)
    _check_complete(rows, chosen)
    cluster, notes = _clusters(rows, chosen, columns or {})
    return Chosen(rows, tuple(chosen.tolist()), cluster, left_out, notes)


def texts(column: pd.Series) -> NDArray[np.str_]:
    """A column's cells as text, empty ones as "nan"."""
    return np.array([str(cell) for cell in column])


def _names(table: pd.DataFrame) -> NDArray[np.str_]:
    if "run" in table.columns:
        return texts(table["run"])
    return np.array([str(number) for number in range(len(table))])


def _check_comparable(rows: pd.DataFrame) -> None:
    for column in COMPARABLE:
        if column in rows.columns:
            values = sorted(set(texts(rows[column]).tolist()))
            if len(values) > 1:
                raise UserError(
                    f"table: {column}: {len(values)} different values ({', '.join(values[:4])}): losses of these rows "
                    "do not compare; fit the rows of each apart"
                )


def _check_complete(rows: pd.DataFrame, names: NDArray[np.str_]) -> None:
    """Losses are of the last weights, and of whole runs."""
    if {"weights_step", "steps"} <= set(rows.columns):
        step, steps = column_numbers(rows, "weights_step"), column_numbers(rows, "steps")
        other = np.isfinite(step) & (step != steps)
        if other.any():
            raise UserError(
                f"table: weights_step: the losses of {_some(names[other])} are of step {step[other][0]:g} of "
                f"{steps[other][0]:g}: not of the last weights (the best ones are a selection); collect the study anew"
            )
    if {"samples", "steps", "batch"} <= set(rows.columns):
        samples, due = column_numbers(rows, "samples"), column_numbers(rows, "steps") * column_numbers(rows, "batch")
        short = samples < due * (1 - 1e-9)
        if short.any():
            raise UserError(
                f"table: samples: {_some(names[short])} saw {samples[short][0]:g} of {due[short][0]:g} samples "
                "(steps x batch): the run was cut short; finish it, or take the row out"
            )


def _clusters(
    rows: pd.DataFrame, names: NDArray[np.str_], columns: Mapping[str, str]
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Labels of runs that are one but for the seed. Raises UserError where one run stands in the table twice."""
    twice = (
        rows.duplicated(subset=["run"], keep=False).to_numpy() if "run" in rows.columns else np.zeros(len(rows), bool)
    )
    if twice.any():
        raise UserError(f"table: run: {_some(names[twice])} stand in the table more than once; keep one row of each")
    identity = [column for column in IDENTITY if column in rows.columns]
    given = [
        columns.get(name, COLUMNS.get(name, ""))
        for name in ("n", "d", "c", "unique", "lr", "experts", "granularity", "x")
    ]
    identity += [column for column in given if column in rows.columns and column not in identity]
    if "seed" not in rows.columns or not identity:
        same = rows.duplicated(keep=False).to_numpy()
        if same.any():
            raise UserError(
                f"table: rows {', '.join(names[same][:6])} equal other rows in all columns; keep one of each (repeats "
                "of a run need a column seed)"
            )
        return None, ()
    twice = rows.duplicated(subset=[*identity, "seed"], keep=False).to_numpy()
    if twice.any():
        raise UserError(
            f"table: {_some(names[twice])} are the same run with the same seed (equal: {', '.join(identity[:4])}, ... "
            "and seed); keep one row of it"
        )
    keys = map("|".join, zip(*(texts(rows[column]) for column in identity), strict=True))
    seen: dict[str, int] = {}
    return tuple(seen.setdefault(key, len(seen)) for key in keys), ()


def column_numbers(rows: pd.DataFrame, column: str) -> Array:
    """A column as float64.

    Raises:
        UserError: no such column, naming those there are; values that are not numbers.
    """
    if column not in rows.columns:
        raise UserError(f"table: column {column!r} is missing; there are {', '.join(map(str, rows.columns))}")
    values = pd.to_numeric(rows[column], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    wrong = np.isnan(values) & rows[column].notna().to_numpy()
    if rows[column].dtype == bool or wrong.any():
        told = rows[column].to_numpy()[wrong][:1]
        raise UserError(f"table: {column}: not a column of numbers (for one: {', '.join(map(repr, told))}); mend it")
    return values


def inputs_of(law: str, rows: pd.DataFrame, columns: Mapping[str, str]) -> dict[str, Any]:
    """The arrays that the law's fit takes, by the name of its argument.

    Args:
        columns: names of columns for `n`, `d`, `c`, `loss`, `unique`, `experts`, `granularity`, `lr`, `score`, where
            they are not those of `COLUMNS`; and `x` for `power` (n, d, c, or a column).

    Raises:
        UserError: missing columns, columns that are no numbers, unknown keys in `columns`.
    """
    unknown = set(columns) - set(COLUMNS) - {"x"}
    if unknown:
        raise UserError(f"columns: {', '.join(sorted(unknown))}: unknown; give {', '.join(COLUMNS)} or x")
    source = {**COLUMNS, **columns}
    x = columns.get("x", "n")
    wanted: dict[str, dict[str, str]] = {
        "power": {"x": source.get(x, x)},
        "chinchilla": {"N": source["n"], "D": source["d"]},
        "data": {"N": source["n"], "D": source["d"], "unique": source["unique"]},
        "isoflop": {"C": source["c"], "N": source["n"], "D": source["d"]},
        "routed": {"N": source["n"], "E": source["experts"]},
        "joint-moe": {"N_active": source["n"], "E": source["experts"], "D": source["d"]},
        "fine-grained-moe": {"N": source["n"], "G": source["granularity"], "D": source["d"]},
        "var": {"N": source["n"], "D": source["d"]},
        "lr": {"N": source["n"], "D": source["d"], "lr": source["lr"]},
        "link": {"score": source["score"]},
    }
    if law not in wanted:
        raise UserError(f"law {law!r}: no such law; choose one of {', '.join(wanted)}")
    names = wanted[law] | ({} if law == "var" else {"loss": source["loss"]})
    if law == "isoflop" and "d" not in columns and source["d"] not in rows.columns:
        del names["D"]  # it is C / 6 N then
    missing = [column for column in names.values() if column not in rows.columns]
    if missing:
        raise UserError(
            f"{law}: columns {', '.join(missing)} are missing; there are {', '.join(map(str, rows.columns))}; name the "
            f"table's own for {', '.join(wanted[law])}"
        )
    result: dict[str, Any] = {name: column_numbers(rows, column) for name, column in names.items()}
    for name in {"E", "G"} & set(result):
        result[name] = _of_dense(rows, result[name])
    if law == "data" and "unique" not in columns:
        # Images become tokens, as D is.
        if "samples" not in rows.columns:
            raise UserError(
                "data: the column unique_images counts images and D counts tokens; add a column samples, or name a "
                "column of unique tokens (--unique)"
            )
        result["unique"] = result["unique"] * (result["D"] / column_numbers(rows, "samples"))
    if law == "var":
        result |= _by_scale(rows)
    return result


def _of_dense(rows: pd.DataFrame, values: Array) -> Array:
    """A dense model has one expert, of granularity 1, whatever its cell says."""
    if "kind" not in rows.columns:
        return values
    dense = texts(rows["kind"]) == "dense"
    return np.where(dense, 1.0, values)


def _by_scale(rows: pd.DataFrame) -> dict[str, Any]:
    """Losses (R, K) of `loss_scale_1` to K, and the tokens of each scale, from the sides in column `scales`."""
    found = (re.fullmatch(r"loss_scale_(\d+)", str(column)) for column in rows.columns)
    count = len([match for match in found if match])
    if count == 0 or "scales" not in rows.columns:
        raise UserError("var: columns loss_scale_1, loss_scale_2, ... and scales are needed; collect the study anew")
    losses = np.stack([column_numbers(rows, f"loss_scale_{scale}") for scale in range(1, count + 1)], 1)
    sides = [int(side) for side in re.findall(r"\d+", str(rows["scales"].iloc[0]))]
    if len(sides) != count:
        raise UserError(f"var: scales lists {len(sides)} sides, but there are {count} columns loss_scale_k")
    return {"loss_by_scale": losses, "tokens_of_scale": np.array([side**2 for side in sides])}


def _some(names: NDArray[np.str_]) -> str:
    more = "" if len(names) <= 4 else f" and {len(names) - 4} more"
    return ", ".join(names[:4]) + more
