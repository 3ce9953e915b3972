"""Draws the pictures of docs/concepts.md into docs/figures/.

python docs/tools/figures.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from sklearn.datasets import load_sample_image

from mepa_ds.data.order import SampleOrder
from mepa_ds.reports import style
from mepa_ds.scales import ScaleSchedule

OUT = Path(__file__).parent.parent / "figures"
SIDES = (1, 2, 3, 4, 6, 8, 12, 16)


def main() -> None:
    with style.drawing():
        for draw in (scales, attention, mixture, guidance, order):
            style.save_png(draw(), OUT / f"concept_{draw.__name__}.png")


def scales() -> Figure:
    """A photo as sums of residuals, in pixels: each scale is what the scales before it have left over, made small."""
    photo = torch.tensor(load_sample_image("flower.jpg")[20:420, 120:520].copy()).permute(2, 0, 1)[None].float() / 255
    photo = F.interpolate(photo, size=(96, 96), mode="area")
    f_hat, pictures = torch.zeros_like(photo), []
    for side in SIDES:
        small = F.interpolate(photo - f_hat, size=(side, side), mode="area")
        f_hat = f_hat + F.interpolate(small, size=(96, 96), mode="bicubic")
        pictures.append((small, f_hat))
    figure = Figure(figsize=(1.45 * len(SIDES), 3.5), layout="constrained")
    axes = figure.subplots(2, len(SIDES))
    for column, (side, (small, sums)) in enumerate(zip(SIDES, pictures, strict=True)):
        _show(axes[0, column], small / 2 / small.abs().max() + 0.5, f"scale {column + 1}\n{side} x {side} tokens")
        _show(axes[1, column], sums, "")
    axes[0, 0].set_ylabel("residual")
    axes[1, 0].set_ylabel("sum so far")
    return figure


def _show(axes: Axes, image: torch.Tensor, title: str) -> None:
    axes.imshow(image[0].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.set_title(title, fontsize=9)


def attention() -> Figure:
    """Which tokens a token attends to: those of its own scale and of all before."""
    schedule = ScaleSchedule((1, 2, 3, 4))
    figure, (axes,) = style.new_figure()
    scale_of = np.repeat(np.arange(4), [end - start for start, end in schedule.bounds])
    axes.imshow(np.where(scale_of[:, None] >= scale_of, scale_of[:, None] + 1.0, np.nan), cmap="viridis_r", vmin=-1)
    for start, _ in schedule.bounds[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=1.5)
        axes.axvline(start - 0.5, color="white", linewidth=1.5)
    middles = [(start + end - 1) / 2 for start, end in schedule.bounds]
    axes.set_xticks(middles, ["1", "2", "scale 3", "scale 4"])
    axes.set_yticks(middles, ["scale 1", "scale 2", "scale 3", "scale 4"])
    axes.set_xlabel("is attended to")
    axes.set_ylabel("attends")
    axes.grid(visible=False)
    return figure


def mixture() -> Figure:
    """The way of two tokens through an STMoE layer."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    axes = _canvas(figure, 8.6, 3.6)
    for row, (name, chosen, color) in enumerate(
        (("token of scale 2", (0, 2), style.PALETTE[0]), ("token of scale 9", (1, 2), style.PALETTE[1]))
    ):
        y = 2.5 - 1.6 * row
        _box(axes, 0.1, y, 1.5, 0.6, name, color)
        _box(axes, 2.2, y, 1.7, 0.6, "router: token\n+ its scale's row", style.INK)
        _arrow(axes, (1.6, y + 0.3), (2.2, y + 0.3), color)
        for expert in chosen:
            _arrow(axes, (3.9, y + 0.3), (4.9, 3.05 - 0.75 * expert), color)
            _arrow(axes, (6.1, 3.05 - 0.75 * expert), (7.0, y + 0.3), color)
        _box(axes, 7.0, y, 1.45, 0.6, "weighted sum\n+ shared expert", color)
    for expert in range(4):
        _box(axes, 4.9, 2.8 - 0.75 * expert, 1.2, 0.5, f"expert {expert + 1}", style.FAINT)
    return figure


def guidance() -> Figure:
    """What is compared: sums of enlarged hidden maps with the teacher's features, cell by cell."""
    figure = Figure(figsize=(8.6, 2.9), layout="constrained")
    axes = _canvas(figure, 8.6, 2.9)
    for number, side in enumerate((1, 2, 3, 4)):
        left = 0.1 + 0.8 * number
        _grid(axes, left, 1.5, 0.6, side, style.PALETTE[0])
        axes.text(left + 0.3, 1.35, f"z{number + 1}", ha="center", va="top", fontsize=9)
        if number:
            axes.text(left - 0.1, 1.8, "+", ha="center", va="center", fontsize=13)
    axes.text(1.6, 2.5, "hidden maps of the scales, projected", ha="center", fontsize=9.5)
    _arrow(axes, (3.25, 1.8), (5.4, 1.8), style.INK)
    axes.text(4.3, 1.95, "enlarge and add", ha="center", va="bottom", fontsize=9.5)
    _grid(axes, 5.5, 1.4, 0.8, 4, style.PALETTE[0])
    axes.text(6.75, 1.8, "cosine of\neach cell", ha="center", va="center", fontsize=9)
    _grid(axes, 7.2, 1.4, 0.8, 4, style.PALETTE[2])
    axes.text(7.6, 2.5, "the teacher's features", ha="center", fontsize=9.5)
    _box(axes, 6.9, 0.25, 1.4, 0.6, "frozen teacher\nsees the image", style.PALETTE[2])
    _arrow(axes, (7.6, 0.85), (7.6, 1.35), style.PALETTE[2])
    return figure


def order() -> Figure:
    """The first two global batches of a set of three shards, read by two ranks and by four."""
    sizes, batch = (8, 6, 10), 8
    samples = SampleOrder(sizes, seed=0).epoch(0)[: 2 * batch]
    shard_of = np.repeat(np.arange(3), sizes)
    figure = Figure(figsize=(8.6, 3.3), layout="constrained")
    axes = _canvas(figure, 17.4, 6.2)
    for row, ranks in enumerate((2, 4)):
        y = 3.4 - 2.6 * row
        axes.text(0.2, y + 1.5, f"{ranks} ranks", fontsize=10)
        for position, sample in enumerate(samples):
            color = style.PALETTE[shard_of[sample]]
            x = 0.2 + position + 0.4 * (position // batch)
            _box(axes, x, y + 0.4, 0.86, 0.8, str(sample), color)
            rank = position % batch // (batch // ranks)
            axes.text(x + 0.43, y + 0.2, f"r{rank}", ha="center", va="top", fontsize=8, color=style.FAINT)
        axes.text(4.2, y + 1.5, "step 1", fontsize=9, color=style.FAINT)
        axes.text(12.6, y + 1.5, "step 2", fontsize=9, color=style.FAINT)
    return figure


def _canvas(figure: Figure, width: float, height: float) -> Axes:
    axes = figure.add_subplot()
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return axes


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: Any) -> None:
    box = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc="white", ec=color, lw=1.6)
    axes.add_patch(box)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def _arrow(axes: Axes, start: Sequence[float], end: Sequence[float], color: Any) -> None:
    style_of = {"arrowstyle": "-|>", "mutation_scale": 11, "color": color, "lw": 1.3, "shrinkA": 1, "shrinkB": 2}
    axes.add_patch(FancyArrowPatch(tuple(start), tuple(end), **style_of))  # type: ignore[arg-type]


def _grid(axes: Axes, x: float, y: float, size: float, side: int, color: Any) -> None:
    for line in range(side + 1):
        at = size * line / side
        axes.plot([x + at, x + at], [y, y + size], color=color, lw=1.2)
        axes.plot([x, x + size], [y + at, y + at], color=color, lw=1.2)


if __name__ == "__main__":
    main()
