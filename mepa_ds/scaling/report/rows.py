"""Which rows of a study's table a figure or a law takes, and what they say about noise."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

POINT = ["kind", "depth", "width", "experts", "top_k", "shared", "expert_hidden", "samples", "unique_images", "batch"]
"""Columns that say what a run is, apart from its seed and its learning rate."""

SAME_FLOPS = 1.05


def finished(table: pd.DataFrame, role: str | None = None, kind: str | None = None) -> pd.DataFrame:
    """Returns the finished rows with a loss, of a role and a kind if these are given."""
    kept = (table["status"] == "finished") & table["loss"].notna()
    for column, value in (("role", role), ("kind", kind)):
        if value is not None:
            kept &= table[column] == value
    return table[kept]


def main_kind(table: pd.DataFrame) -> str:
    """Returns the kind of run that the laws of size and data are fitted to: dense where there are any."""
    return "dense" if (finished(table, "fit")["kind"] == "dense").any() else "moe"


def fitted_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the finished rows that the laws of size and data are fitted to."""
    return finished(table, "fit", main_kind(table))


def unfinished(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows that have no final loss: failed, diverged, running, not begun."""
    return table.drop(finished(table).index)


def clusters(rows: pd.DataFrame) -> NDArray[np.int64]:
    """Returns a number for each row; runs that differ in their seed alone have the same."""
    return rows.groupby([*POINT, "lr_peak"], dropna=False, sort=False).ngroup().to_numpy(np.int64)


def envelope(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the points that no other point beats with as few FLOPs or fewer, by FLOPs; seeds are averaged.

    FLOPs that differ by less than 5 % are equal: runs have whole steps, so those of one budget differ a little.
    """
    groups = clusters(rows)
    mean = rows.assign(loss=rows["loss"].groupby(groups).transform("mean"))[~pd.Series(groups, rows.index).duplicated()]
    flops, loss = mean["flops_model"].to_numpy(float), mean["loss"].to_numpy(float)
    best = [loss[flops <= SAME_FLOPS * own].min() for own in flops]
    return mean[loss <= best].sort_values("flops_model", kind="stable")


def sweep_groups(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Returns the runs of each sweep of the learning rate, by rate; the grid's own run is the sweep's middle.

    A sweep's runs differ in nothing but the rate. Groups with fewer than three finished runs are left out.
    """
    found = []
    keys = [*POINT, "seed"]
    rows = finished(table)
    for _, group in rows[rows["role"] != "hold_out"].groupby(keys, dropna=False, sort=False):
        if (group["role"] == "lr").any() and group["lr_peak"].nunique() >= 3:
            found.append(group.sort_values("lr_peak"))
    return found


def size_name(row: pd.Series) -> str:
    """Returns d4w128 for depth 4 and width 128."""
    return f"d{int(row['depth'])}w{int(row['width'])}"


def scale_columns(table: pd.DataFrame) -> list[str]:
    """Returns loss_scale_1 to loss_scale_K."""
    names = [name for name in table.columns if name.startswith("loss_scale_") and table[name].notna().any()]
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))


def tokens_of_scales(table: pd.DataFrame) -> list[int]:
    """Returns the tokens of each scale: 1, 4, 9 for the scales "1,2,3"."""
    return [int(side) ** 2 for side in str(table["scales"].dropna().iloc[0]).split(",")]
