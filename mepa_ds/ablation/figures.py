"""Figures of an ablation: differences from the baseline, cross-entropy by scale, expert load by scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mepa_ds.ablation.config import AblationConfig
from mepa_ds.ablation.results import scores_by_arm
from mepa_ds.ablation.scores import Score, of_scales
from mepa_ds.ablation.statistics import Difference, differences
from mepa_ds.reports.style import FAINT, INK, PALETTE, kinds, new_figure

_BETTER, _WORSE = PALETTE[2], PALETTE[1]
_ROW_INCHES, _PANEL_INCHES = 0.34, 3.1


def differences_figure(table: pd.DataFrame, ablation: AblationConfig, scores: Sequence[Score]) -> Figure:
    """A panel a score: each arm minus the baseline, a dot a seed, the mean with its 95 % interval.

    Arms whose interval leaves out 0 are coloured by whether they are better.
    """
    arms = [arm for arm in ablation.arms if arm != ablation.baseline]
    figure = Figure(figsize=(_PANEL_INCHES * len(scores) + 1.9, _ROW_INCHES * len(arms) + 1.3), layout="constrained")
    panels = np.ravel(figure.subplots(1, len(scores), sharey=True))
    for axes, score in zip(panels, scores, strict=True):
        found = {d.arm: d for d in differences(scores_by_arm(table, score.column), _with_baseline(ablation))}
        for place, arm in enumerate(reversed(arms)):
            if arm not in found:
                axes.text(0, place, "not measured", color=FAINT, va="center", ha="center", fontsize=9)
                continue
            _draw_difference(axes, place, found[arm], score)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_title(score.title, fontsize=10.5)
        axes.set_xlabel(f"{score.better} is better", fontsize=9)
        axes.tick_params(axis="x", labelsize=8.5)
        axes.grid(axis="y", visible=False)
    panels[0].set_ylim(-0.6, len(arms) - 0.4)
    panels[0].set_yticks(range(len(arms)), [ablation.arms[arm].title for arm in reversed(arms)], fontsize=9.5)
    figure.suptitle(
        f"difference from {ablation.arms[ablation.baseline].title}: seeds, mean, 95 % interval", fontsize=11
    )
    return figure


def _draw_difference(axes, place: int, difference: Difference, score: Score) -> None:  # type: ignore[no-untyped-def]
    color = INK
    if np.isfinite(difference.low) and (difference.low > 0 or difference.high < 0):
        is_better = (difference.mean < 0) == (score.better == "lower")
        color = _BETTER if is_better else _WORSE
    if np.isfinite(difference.low):
        axes.plot([difference.low, difference.high], [place, place], color=color, linewidth=1.6)
    axes.plot(difference.by_seed, [place] * len(difference.by_seed), ".", color=FAINT, markersize=4.5)
    axes.plot([difference.mean], [place], "o", color=color, markersize=5.5)


def scales_figure(table: pd.DataFrame, ablation: AblationConfig) -> Figure:
    """By scale, each arm's held-out cross-entropy minus the baseline's of the same seed, mean over seeds."""
    figure, (axes,) = new_figure()
    scales = of_scales(list(table.columns))
    looks = kinds([arm for arm in ablation.arms if arm != ablation.baseline])
    for arm, (color, marker) in looks.items():
        means = []
        for score in scales:
            found = differences(scores_by_arm(table, score.column), [(arm, ablation.baseline)])
            means.append(found[0].mean if found else np.nan)
        places = range(1, len(scales) + 1)
        # More arms than colours: the second round of them is dashed.
        style = "-" if list(looks).index(arm) < len(PALETTE) else "--"
        axes.plot(places, means, style, color=color, marker=marker, label=ablation.arms[arm].title, linewidth=1.4)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(range(1, len(scales) + 1))
    axes.set_xlabel("scale")
    axes.set_ylabel("held-out CE minus baseline (nats)")
    axes.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.set_figwidth(8.2)
    return figure


def load_figure(variance: Mapping[str, np.ndarray], ablation: AblationConfig) -> Figure:
    """By scale, the variance over experts of their load in percent, mean and range over seeds; arms with experts."""
    figure, (axes,) = new_figure()
    for number, (arm, variance_RS) in enumerate(variance.items()):
        places = np.arange(1, variance_RS.shape[1] + 1)
        color = PALETTE[number % len(PALETTE)]
        style = "-" if number < len(PALETTE) else "--"
        axes.plot(places, variance_RS.mean(0), style, marker="o", color=color, label=ablation.arms[arm].title)
        axes.fill_between(places, variance_RS.min(0), variance_RS.max(0), color=color, alpha=0.12, linewidth=0)
    axes.set_xticks(places)
    axes.set_yscale("symlog", linthresh=1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("scale")
    axes.set_ylabel("variance of load over experts (percent²)")
    axes.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.set_figwidth(8.2)
    return figure


def _with_baseline(ablation: AblationConfig) -> list[tuple[str, str]]:
    return [pair for pair in ablation.pairs if pair[1] == ablation.baseline]
