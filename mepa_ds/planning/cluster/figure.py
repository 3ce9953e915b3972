"""The parts of a step against the number of ranks, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mepa_ds.planning.cluster.search import Simulated
from mepa_ds.planning.cluster.step import PARTS


def draw(best: Sequence[Simulated], path: Path) -> None:
    """Writes a bar a number of ranks, its parts as shares of the step; MFU stands above it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = [str(simulated.layout.world_size) for simulated in best]
    below = [0.0] * len(best)
    for part in PARTS:
        shares = [simulated.seconds[part] / simulated.step_seconds for simulated in best]
        axes.bar(labels, shares, bottom=below, label=part)
        below = [start + share for start, share in zip(below, shares, strict=True)]
    for place, simulated in enumerate(best):
        axes.text(place, 1.01, f"{simulated.mfu:.0%}", ha="center")
    axes.set(xlabel="GPUs", ylabel="share of a step (MFU above)", ylim=(0, 1.08))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
