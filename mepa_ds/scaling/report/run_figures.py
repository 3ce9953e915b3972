"""Figures of single dimensions of a study: FLOP budgets, learning rates, experts, scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mepa_ds.reports import style
from mepa_ds.scaling.laws import ChinchillaFit, ScalesFit
from mepa_ds.scaling.laws.minima import parabola
from mepa_ds.scaling.report.law_figures import COMPUTE, DATA, LOSS, SIZE
from mepa_ds.scaling.report.rows import finished, fitted_rows, scale_columns, size_name, sweep_groups

_GRID = 60


def isoflop_figure(
    table: pd.DataFrame, budgets: dict[str, tuple[float, ...]], law: ChinchillaFit | None
) -> Figure | None:
    """Loss against N at each FLOP budget, its parabola with the minimum, and the surface of the law of N and D.

    `budgets`: of each group of runs that has any. None without such runs.
    """
    rows = fitted_rows(table)
    rows = rows[rows["group"].isin(list(budgets))]
    if rows.empty:
        return None
    figure, (axes,) = style.new_figure()
    ends = []
    levels = np.unique([level for group in budgets.values() for level in group])
    nearest = np.abs(np.log(rows["flops_model"].to_numpy(float)[:, None] / levels)).argmin(1)
    for index, (level, color) in enumerate(zip(levels, style.shades(len(levels)), strict=True)):
        group = rows[nearest == index]
        if group.empty:
            continue
        mean = group.groupby("params_matrix")["loss"].mean()
        axes.scatter(group["params_matrix"], group["loss"], color=color, s=30, zorder=4)
        curve, minimum = fitted_parabola(group["params_matrix"].to_numpy(float), group["loss"].to_numpy(float))
        end = (float(mean.index[-1]), float(mean.iloc[-1]))
        if curve is not None:
            axes.plot(*curve, color=color)
            end = (float(curve[0][-1]), float(curve[1][-1]))
        if minimum is not None:
            axes.scatter(*minimum, marker="D", s=60, facecolor="white", edgecolor=color, linewidth=2, zorder=5)
        if law is not None:
            sizes = np.geomspace(mean.index.min(), mean.index.max(), _GRID)
            per = np.interp(
                np.log(sizes), *_per_weight(group)
            )  # FLOPs a weight and token change with the size, by attention and head
            axes.plot(sizes, law.predict(sizes, level / (per * sizes)), ":", color=color, linewidth=1.4)
        ends.append((*end, f"C = {style.power(level)}", color))
    axes.plot([], [], color=style.FAINT, label="parabola in log N")
    axes.scatter([], [], marker="D", s=60, facecolor="white", edgecolor=style.FAINT, linewidth=2, label="its minimum")
    if law is not None:
        axes.plot([], [], ":", color=style.FAINT, label="the law of N and D")
    style.log_axes(axes, SIZE, LOSS)
    style.end_labels(axes, ends)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    return figure


def _per_weight(group: pd.DataFrame) -> tuple[Any, Any]:
    """log N and FLOPs a weight and token of the sizes."""
    mean = (group["flops_model"] / (group["params_matrix"] * group["tokens"])).groupby(group["params_matrix"]).mean()
    return np.log(mean.index.to_numpy(float)), mean.to_numpy(float)


def fitted_parabola(x: Any, loss: Any) -> tuple[tuple[Any, Any] | None, tuple[float, float] | None]:
    """Returns the parabola of loss in log x through three points or more, and its minimum, as the laws take it."""
    if len(np.unique(x)) < 3:
        return None, None
    centre = float(np.log(x).mean())
    grid = np.geomspace(x.min(), x.max(), _GRID)
    curve = np.polyval(np.polyfit(np.log(x) - centre, loss, 2), np.log(grid) - centre)
    place, least, why = parabola(np.asarray(x, float), np.asarray(loss, float))
    return (grid, curve), None if why else (place, least)


def sweeps_figure(table: pd.DataFrame) -> Figure | None:
    """Loss against peak learning rate, with the minimum of each sweep. None without a sweep."""
    groups = sweep_groups(table)
    if not groups:
        return None
    figure, (axes,) = style.new_figure()
    for (color, marker), group in zip(style.kinds(range(len(groups))).values(), groups, strict=True):
        first = group.iloc[0]
        rates, losses = group["lr_peak"].to_numpy(float), group["loss"].to_numpy(float)
        curve, minimum = fitted_parabola(rates, losses)
        experts = f", E = {int(first['experts'])}" if first["kind"] == "moe" else ""
        label = f"{size_name(first)}{experts}, {style.count(first['samples'])} images"
        label += f": best {minimum[0]:.2e}" if minimum else ": no minimum inside the sweep"
        axes.plot(rates, losses, marker=marker, linestyle="none", color=color, label=label)
        if curve is not None:
            axes.plot(*curve, color=color, linewidth=1.2)
        if minimum is not None:
            axes.axvline(minimum[0], color=color, linestyle=":", linewidth=1.2)
    style.log_axes(axes, "peak learning rate of the optimizer", LOSS, log_y=False)
    figure.legend(loc="outside lower center", ncols=1 if len(groups) < 3 else 2)
    figure.set_size_inches(6.8, 5.0)
    return figure


def experts_figure(table: pd.DataFrame, noise: float | None) -> Figure | None:
    """Loss against the number of experts, a line for each size and length; dense runs stand at E = 1.

    `noise`: standard deviation of log loss between seeds, for bars of two of them.
    """
    rows = finished(table, "fit")
    if not (rows["kind"] == "moe").any():
        return None
    moe = rows[rows["kind"] == "moe"]
    keys = ["depth", "width", "samples", "unique_images"]
    ladders = [
        (key, group, [*(group.groupby(["top_k", "shared", "expert_hidden"], sort=True))])
        for key, group in moe.groupby(keys, dropna=False, sort=True)
    ]
    figure, (axes,) = style.new_figure()
    ends = []
    lines = [(key, settings, group) for key, _, groups in ladders for settings, group in groups]
    for (color, marker), (key, settings, group) in zip(style.kinds(range(len(lines))).values(), lines, strict=True):
        same = (rows[keys].fillna(-1) == pd.Series(key, keys).fillna(-1)).all(axis=1) & (rows["kind"] == "dense")
        dense = rows[same]
        ladder = pd.concat([dense.assign(experts=1), group]).groupby("experts")["loss"].mean()
        label = (
            f"d{int(key[0])}w{int(key[1])}, {style.count(key[2])} images, top {int(settings[0])}"
            f"{' + shared' if settings[1] else ''} of hidden width {int(settings[2])}"
        )
        bars = None if noise is None else 2 * noise * ladder.to_numpy()
        axes.errorbar(
            ladder.index, ladder.to_numpy(), yerr=bars, marker=marker, color=color, label=label, capsize=3, elinewidth=1
        )
        if len(dense) and len(ladder) > 1:
            gain = 100 * (1 - ladder.iloc[-1] / ladder.iloc[0])
            ends.append((float(ladder.index[-1]), float(ladder.iloc[-1]), f"{-gain:+.1f} %", color))
    axes.set_xscale("log", base=2)
    ticks = np.unique([1, *moe["experts"].astype(int)])
    axes.set_xticks(ticks, ["dense" if tick == 1 else str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("E, routed experts (percent: against dense)")
    axes.set_ylabel(LOSS)
    style.end_labels(axes, ends)
    figure.legend(loc="outside lower center", ncols=1)
    figure.set_size_inches(6.8, 4.6 + 0.22 * len(lines))
    return figure


def scales_figure(table: pd.DataFrame, law: ScalesFit | None) -> Figure | None:
    """Loss of each scale against N at the longest runs, against D at the largest size, and against C.

    None without losses by scale.
    """
    rows, columns = fitted_rows(table), scale_columns(table)
    if rows.empty or not columns:
        return None
    figure, panels = style.new_figure(3)
    longest, largest = rows["tokens"].max(), rows["params_matrix"].max()
    cuts = (
        ("params_matrix", rows[rows["tokens"] == longest], f"{SIZE}  (at D = {style.count(longest)})"),
        ("tokens", rows[rows["params_matrix"] == largest], f"{DATA}  (at N = {style.count(largest)})"),
        ("flops_model", rows, COMPUTE + "  (all runs)"),
    )
    for axes, (x, cut, label) in zip(panels, cuts, strict=True):
        grid = np.geomspace(cut[x].min(), cut[x].max(), _GRID)
        curves = None
        if law is not None and x != "flops_model":
            inputs = (grid, np.full(_GRID, longest)) if x == "params_matrix" else (np.full(_GRID, largest), grid)
            curves = law.predict_scales(*inputs)
        ends = []
        for scale, (column, color) in enumerate(zip(columns, style.shades(len(columns)), strict=True), start=1):
            mean = cut.groupby(x)[column].mean()
            joined = curves is None and x != "flops_model"
            axes.plot(mean.index, mean.to_numpy(), "o-" if joined else "o", color=color, markersize=5)
            if curves is not None:
                axes.plot(grid, curves[:, scale - 1], color=color)
            ends.append((float(mean.index[-1]), float(mean.iloc[-1]), f"scale {scale}", color))
        style.log_axes(axes, label, LOSS)
        style.end_labels(axes, ends)
    figure.set_size_inches(15, 4.6)
    return figure
