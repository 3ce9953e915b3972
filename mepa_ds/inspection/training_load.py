"""The experts' load and the routers' entropy over a run, from its metrics.jsonl.

Shapes: R records, N MoE layers, S scales, E experts.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mepa_ds.files import atomic_path
from mepa_ds.inspection.subject import METRICS_NAME, Drawn, Picture, Subject
from mepa_ds.reports import style
from mepa_ds.runtime.metrics import read_metrics

_COLUMNS = 4


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
    steps = [record["step"] for record in records]
    layers = list(records[0]["layers"])
    _write_csv(load.with_suffix(".csv"), records, "load_scale", ("step", "block", "scale", "expert", "load"))
    _write_csv(entropy.with_suffix(".csv"), records, "entropy_scale", ("step", "block", "scale", "entropy"))
    with style.drawing():
        _draw_load(records, layers, steps, load)
        _draw_entropy(subject, records, layers, steps, entropy)
    return [
        Picture(
            load,
            "share of the routed tokens of all scales that each expert got at each logged step, a panel for each MoE "
            "block; the data have every scale",
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
                        writer.writerows([record["step"], block, scale, *pair] for pair in enumerate(values))
                    else:
                        writer.writerow([record["step"], block, scale, values])


def _draw_load(records: list[dict[str, Any]], layers: list[str], steps: list[int], path: Path) -> None:
    load_NER = np.array([[record["layers"][layer]["load"] for record in records] for layer in layers]).swapaxes(1, 2)
    columns = min(len(layers), _COLUMNS)
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(3.2 * columns + 1, 2.4 * rows + 0.8), layout="constrained")
    figure.suptitle("Expert load over training, all scales", fontsize=13)
    panels = np.ravel(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False))
    even = 1 / load_NER.shape[1]
    most = max(float(load_NER.max()), 2 * even)
    for axes, layer, load_ER in zip(panels, layers, load_NER, strict=False):
        edges = np.arange(load_ER.shape[0] + 1) - 0.5
        drawn = axes.pcolormesh(_edges(steps), edges, load_ER, vmin=0, vmax=most, cmap="viridis")
        axes.set_title(f"block {layer}")
        axes.grid(False)
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    figure.supxlabel("step")
    figure.supylabel("expert")
    figure.colorbar(drawn, ax=panels.tolist(), label=f"share of tokens (even: {even:.3f})")
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
