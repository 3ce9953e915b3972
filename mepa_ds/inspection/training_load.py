"""The experts' load and the routers' entropy over a run, from its metrics.jsonl.

Shapes: R records, N MoE layers, S scales, E experts.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mepa_ds.files import atomic_path
from mepa_ds.inspection.subject import Drawn, Picture, Subject
from mepa_ds.reports import style
from mepa_ds.runtime.metrics import METRICS_NAME, as_written, read_metrics
from mepa_ds.safety.text import cell

_MOST_TIMES = 4  # loads above so many times the even one have one colour


def draw_training_load(subject: Subject, directory: Path) -> Drawn:
    """Writes expert_load.png and .csv, router_entropy.png and .csv."""
    if not subject.blocks:
        return "expert load over training: the model is dense, it has no experts"
    if subject.run is None or not (subject.run / METRICS_NAME).exists():
        return "expert load over training: weights alone have no record of it; give the directory of the run"
    records = [r for r in read_metrics(subject.run / METRICS_NAME) if r.get("event") == "routing"]
    if not records:
        return f"expert load over training: {subject.run / METRICS_NAME} has no routing record yet"
    load, entropy = directory / "expert_load.png", directory / "router_entropy.png"
    with as_written(subject.run / METRICS_NAME), style.drawing():
        steps = [record["step"] for record in records]
        layers = list(records[0]["layers"])
        _write_csv(load.with_suffix(".csv"), records, "load_scale", ("step", "block", "scale", "expert", "load"))
        _write_csv(entropy.with_suffix(".csv"), records, "entropy_scale", ("step", "block", "scale", "entropy"))
        _draw_load(subject, records, layers, steps, load)
        _draw_entropy(subject, records, layers, steps, entropy)
    return [
        Picture(
            load,
            "share of a scale's routed tokens that each expert got at each logged step, a row for each MoE block, a "
            "column for each scale",
            load.with_suffix(".csv"),
        ),
        Picture(
            entropy,
            "entropy of the routers' probabilities in nats at each logged step, a line for each scale, mean over MoE "
            "blocks; dashed: all experts equally probable",
            entropy.with_suffix(".csv"),
        ),
    ]


def _write_csv(path: Path, records: list[dict[str, Any]], name: str, columns: tuple[str, ...]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for record in records:
            for block, layer in record["layers"].items():
                for scale, values in enumerate(layer[name], start=1):
                    if isinstance(values, list):
                        writer.writerows(
                            [record["step"], cell(block), scale, *map(cell, pair)] for pair in enumerate(values)
                        )
                    else:
                        writer.writerow([record["step"], cell(block), scale, cell(values)])


def _draw_load(
    subject: Subject, records: list[dict[str, Any]], layers: list[str], steps: list[int], path: Path
) -> None:
    """A panel for each block (rows) and scale (columns): experts upwards, steps to the right."""
    load_NSER = np.array([[record["layers"][layer]["load_scale"] for record in records] for layer in layers])
    load_NSER = np.moveaxis(load_NSER, 1, -1)
    N, S, E, _ = load_NSER.shape
    figure = Figure(figsize=(max(1.3 * S + 1.6, 5.5), max(0.9 * N + 1.4, 3.5)), layout="constrained")
    figure.suptitle("Expert load over training, by block and scale", fontsize=13)
    panels_NS = figure.subplots(N, S, sharex=True, sharey=True, squeeze=False)
    for panels_S, layer, load_SER in zip(panels_NS, layers, load_NSER, strict=True):
        for axes, load_ER in zip(panels_S, load_SER, strict=True):
            drawn = axes.pcolormesh(
                _edges(steps), np.arange(E + 1) - 0.5, load_ER, vmin=0, vmax=_MOST_TIMES / E, cmap="viridis"
            )
            axes.grid(False)
            axes.tick_params(labelsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        panels_S[0].set_ylabel(f"block {layer}", fontsize=9)
    for axes, side in zip(panels_NS[0], subject.model.schedule.sides, strict=True):
        axes.set_title(f"{side} x {side}", fontsize=10)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    bar = figure.colorbar(drawn, ax=panels_NS.ravel().tolist(), extend="max", fraction=0.05)
    bar.set_label(f"share of a scale's tokens (even: {1 / E:.3f})", fontsize=9)
    style.save_png(figure, path)


def _edges(steps: list[int]) -> np.ndarray[Any, Any]:
    """The borders between the records' columns."""
    places = np.asarray(steps, float)
    if len(places) == 1:
        return np.array([places[0] - 0.5, places[0] + 0.5])
    middle = (places[1:] + places[:-1]) / 2
    return np.concatenate([[2 * places[0] - middle[0]], middle, [2 * places[-1] - middle[-1]]])


def _draw_entropy(
    subject: Subject, records: list[dict[str, Any]], layers: list[str], steps: list[int], path: Path
) -> None:
    entropy_RS = np.array(
        [np.mean([record["layers"][layer]["entropy_scale"] for layer in layers], 0) for record in records]
    )
    figure, (axes,) = style.new_figure(1, "Entropy of the routers, mean over MoE blocks")
    sides = subject.model.schedule.sides
    for entropy_R, side, colour in zip(entropy_RS.T, sides, style.shades(len(sides)), strict=True):
        axes.plot(steps, entropy_R, color=colour, label=f"{side} x {side}", marker="." if len(steps) == 1 else None)
    moe = subject.model.config.moe
    assert moe is not None
    axes.axhline(np.log(moe.num_experts), color=style.FAINT, linestyle="--")
    axes.set(xlabel="step", ylabel="nats")
    axes.legend(title="scale", loc="center left", bbox_to_anchor=(1, 0.5))
    style.save_png(figure, path)
