"""Figures of the laws of size, data and compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mepa_ds.reports import style
from mepa_ds.scaling.laws import ChinchillaFit, Fit, PowerFit
from mepa_ds.scaling.report.rows import envelope, finished, fitted_rows, size_name

LOSS, SIZE, DATA, COMPUTE = "loss, nats a token", "N, matrix weights", "D, tokens", "C, model FLOPs"
_MOST_CURVES = 6
_GRID = 80


def laws_figure(table: pd.DataFrame, law: ChinchillaFit | None) -> Figure | None:
    """Loss against N, a curve for each D, and the other way round; bands are the 95 % intervals of the law itself."""
    rows = fitted_rows(table)
    if rows.empty:
        return None
    figure, panels = style.new_figure(2)
    held = finished(table, "hold_out", rows["kind"].iloc[0])
    for axes, x, other in ((panels[0], "params_matrix", "tokens"), (panels[1], "tokens", "params_matrix")):
        ends = _panel(axes, rows, x, other, law, float(max([rows[x].max(), *held[x]])))
        if len(held):
            axes.scatter(held[x], held["loss"], marker="*", s=130, color=style.HELD_OUT, zorder=5, label="held out")
        style.log_axes(axes, SIZE if x == "params_matrix" else DATA, LOSS)
        style.end_labels(axes, ends)
    if law is not None:
        panels[0].plot([], [], "--", color=style.FAINT, linewidth=1.2, label="extrapolation")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(loc="upper right")
    return figure


def _panel(
    axes: Axes, rows: pd.DataFrame, x: str, other: str, law: ChinchillaFit | None, last: float
) -> list[tuple[float, float, str, str]]:
    """Draws one panel, with the law up to the input `last`, and returns the labels of its curves."""
    labels = []
    levels = _levels(rows[other].to_numpy(float))
    nearest = np.abs(np.log(rows[other].to_numpy(float)[:, None] / levels)).argmin(1)
    name = "D" if other == "tokens" else "N"
    for index, (level, color) in enumerate(zip(levels, style.shades(len(levels)), strict=True)):
        group = rows[nearest == index]
        axes.scatter(group[x], group["loss"], color=color, s=28, zorder=4)
        if law is None:
            if group.empty:
                continue
            mean = group.groupby(x)["loss"].mean()
            axes.plot(mean.index, mean.to_numpy(), color=color, linewidth=1)
            end = (float(mean.index[-1]), float(mean.iloc[-1]))
        else:
            sampled = np.geomspace(rows[x].min(), rows[x].max(), _GRID)
            end = _curve(axes, law, x, (sampled, level), color, "-")
            if last > rows[x].max():
                end = _curve(axes, law, x, (np.geomspace(rows[x].max(), last, _GRID), level), color, "--")
        labels.append((*end, f"{name} = {style.count(level)}", color))
    return labels


def _curve(
    axes: Axes, law: ChinchillaFit, x: str, place: tuple[Any, float], color: str, line: str
) -> tuple[float, float]:
    """Draws the law along a grid of x at one level of the other input, with its interval; returns its end."""
    grid, level = place
    inputs = (grid, np.full(len(grid), level)) if x == "params_matrix" else (np.full(len(grid), level), grid)
    curve = np.asarray(law.predict(*inputs))
    axes.plot(grid, curve, line, color=color, linewidth=1.8 if line == "-" else 1.2)
    if law.draws:
        axes.fill_between(grid, *law.predict_interval(*inputs, noise=False), color=color, alpha=style.BAND, lw=0)
    return float(grid[-1]), float(curve[-1])


def _levels(values: Any) -> Any:
    """The values themselves, or a few between the smallest and the largest where there are many."""
    unique = np.unique(values)
    if len(unique) <= _MOST_CURVES:
        return unique
    return np.geomspace(unique[0], unique[-1], _MOST_CURVES - 1)


def compute_figure(table: pd.DataFrame, power: PowerFit | None, law: ChinchillaFit | None) -> Figure | None:
    """Loss against FLOPs, the envelope, its power law with interval, and the best split by the law of N and D."""
    rows = fitted_rows(table)
    if rows.empty:
        return None
    figure, (axes,) = style.new_figure()
    held = finished(table, "hold_out", rows["kind"].iloc[0])
    sizes = rows.drop_duplicates(["params_matrix"]).sort_values("params_matrix")
    for color, (_, size) in zip(style.shades(len(sizes)), sizes.iterrows(), strict=True):
        group = rows[rows["params_matrix"] == size["params_matrix"]].sort_values("flops_model")
        label = f"{size_name(size)}, N = {style.count(size['params_matrix'])}"
        axes.plot(group["flops_model"], group["loss"], "o", color=color, markersize=5.5, label=label)
        x, y = group["flops_model"].to_numpy(float), group["loss"].to_numpy(float)
        if law is not None:
            tokens = np.geomspace(group["tokens"].min(), group["tokens"].max(), _GRID)
            x, y = tokens * (x / group["tokens"]).iloc[0], law.predict(size["params_matrix"], tokens)
        axes.plot(x, y, color=color, linewidth=1)
    front = envelope(rows)
    axes.scatter(
        front["flops_model"], front["loss"], s=90, facecolor="none", edgecolor=style.INK, zorder=5, label="envelope"
    )
    most = max([rows["flops_model"].max(), *held["flops_model"]])
    grid = np.geomspace(rows["flops_model"].min(), 1.3 * most, _GRID)
    if power is not None:
        axes.plot(grid, power.predict(grid), color=style.INK, linewidth=1.4, label="power law of the envelope")
        if power.draws:
            axes.fill_between(grid, *power.predict_interval(grid, noise=False), color=style.INK, alpha=0.1, lw=0)
    if law is not None and min(law.A, law.B, law.alpha, law.beta) > 0:
        per = float(np.median(rows["flops_model"] / (rows["params_matrix"] * rows["tokens"])))
        best = [(c, found.loss) for c in grid if not (found := law.optimum(float(c), per)).flags]
        if best:
            label = f"best split by the law (C = {per:.2f} N D),\nwhere it lies among the sizes and lengths"
            axes.plot(*zip(*best, strict=True), "--", color=style.PALETTE[3], label=label)
    if len(held):
        axes.scatter(
            held["flops_model"], held["loss"], marker="*", s=150, color=style.HELD_OUT, zorder=6, label="held out"
        )
    low, high = rows["loss"].min(), rows["loss"].max()
    lowest = min([low, *held["loss"]])
    axes.set_ylim(lowest - 0.12 * (high - lowest), high + 0.12 * (high - lowest))
    style.log_axes(axes, COMPUTE, LOSS)
    figure.legend(loc="outside right center")
    figure.set_size_inches(8.6, 4.6)
    return figure


def residuals_figure(rows: pd.DataFrame, law: Fit, inputs: list[str], noise: float | None) -> Figure:
    """Measured over predicted loss of the rows that a law was fitted to, against each input."""
    columns = [name for name in ("params_matrix", "tokens", "flops_model") if name in inputs]
    figure, panels = style.new_figure(len(columns))
    residuals = 100 * np.expm1(np.log(rows["loss"].to_numpy(float)) - np.log(predicted(law, rows, inputs)))
    labels = {"params_matrix": SIZE, "tokens": DATA, "flops_model": COMPUTE}
    for axes, column in zip(panels, columns, strict=True):
        other = next((name for name in columns if name != column), column)
        levels = np.unique(rows[other])
        axes.axhline(0, color=style.INK, linewidth=1)
        if noise is not None:
            axes.axhspan(-200 * noise, 200 * noise, color=style.FAINT, alpha=0.15, lw=0, label="2 deviations of seeds")
        for level, color in zip(levels, style.shades(len(levels)), strict=True):
            of = (rows[other] == level).to_numpy()
            name = "D" if other == "tokens" else "N"
            label = f"{name} = {style.count(level)}" if len(levels) <= _MOST_CURVES and len(columns) > 1 else None
            axes.scatter(rows[column][of], residuals[of], color=color, s=34, label=label, zorder=3)
        axes.axhline(0, color=style.INK, linewidth=1)
        style.log_axes(axes, labels[column], "measured / predicted - 1, percent", log_y=False)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=3)
    return figure


def predicted(law: Fit, rows: pd.DataFrame, inputs: list[str]) -> Any:
    """Returns the law's loss at the rows; `inputs`: the column of each of its inputs."""
    return law.predict(*(rows[name].to_numpy(float) for name in inputs))
