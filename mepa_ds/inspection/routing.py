"""Maps of the routers' choices: for each MoE layer and scale, which expert each position chose, over the image.

Shapes: S scales, L positions of all scales, l of one scale.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

from mepa_ds.images.decoding import Colour
from mepa_ds.images.pictures import save_png
from mepa_ds.images.sheets import Pixels, draw_sheet, resized
from mepa_ds.inspection.scales import save_arrays
from mepa_ds.inspection.subject import Drawn, Picture, Subject
from mepa_ds.inspection.tracing import Traced
from mepa_ds.scales import ScaleSchedule

_SIDE = 80
_OPACITY, _DARKEST = 0.65, 110  # the image below is lightened, or black would hide the colours
_NONE: Colour = (255, 255, 255)
_FEW = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#f0e442", "#17becf", "#111111")


def draw_routing(subject: Subject, traced: Traced | None, classes: list[int], directory: Path) -> Drawn:
    """Writes routing_class0003.png and .npz for the first image of each class that has one."""
    if traced is None:
        return "routing maps: the model is dense, it has no routers"
    moe = subject.model.config.moe
    assert moe is not None
    colours = expert_colours(moe.num_experts)
    legend = [(f"expert {expert}", colour) for expert, colour in enumerate(colours)]
    legend += [("no expert", _NONE)] if moe.router == "expert_choice" else []
    pictures = []
    for label in classes:
        image = traced.first_of(label)
        if image is None:
            continue
        maps_NL = np.stack([layer.first_BL[image] for layer in traced.layers.values()])
        path = directory / f"routing_class{label:04d}.png"
        sheet = draw_sheet(
            routing_tiles(traced.pixels_BHW3[image], maps_NL, subject.model.schedule, colours),
            title=f"{subject.caption(label)}: the expert of largest weight at each position ({traced.source})",
            columns=["image", *(f"{side} x {side}" for side in subject.model.schedule.sides)],
            rows=[f"block {block}" for block in traced.layers],
            legend=legend,
        )
        save_png(sheet.pixels_HW3, path)
        data = path.with_suffix(".npz")
        save_arrays(
            data,
            first_expert_NL=maps_NL,
            chosen_NLE=np.stack([layer.chosen_BLE[image] for layer in traced.layers.values()]),
            entropy_NL=np.stack([layer.entropy_BL[image] for layer in traced.layers.values()]),
            blocks_N=list(traced.layers),
            sides_S=subject.model.schedule.sides,
            pixels_HW3=traced.pixels_BHW3[image],
        )
        shows = (
            f"{subject.caption(label)}: a row for each MoE block, a column for each scale; -1 in the data: no expert"
        )
        pictures.append(Picture(path, shows, data))
    return pictures or f"routing maps: {traced.source} have none of the classes {classes}"


def routing_tiles(
    pixels_HW3: Pixels, first_NL: NDArray[np.int16], schedule: ScaleSchedule, colours: list[Colour]
) -> list[list[Pixels]]:
    """A row for each of N layers: the image, then the colours of each scale's choices laid over it."""
    image = resized(pixels_HW3, _SIDE)
    faint = _DARKEST + image * ((255 - _DARKEST) / 255)
    palette = np.array([*colours, _NONE], np.float32)  # -1 is the last one
    rows = []
    for first_L in first_NL:
        row = [image]
        for side, (start, end) in zip(schedule.sides, schedule.bounds, strict=True):
            cells_hw3 = palette[first_L[start:end].reshape(side, side)]
            over = resized(cells_hw3.astype(np.uint8), _SIDE, smooth=False)
            row.append((faint * (1 - _OPACITY) + over * _OPACITY).round().astype(np.uint8))
        rows.append(row)
    return rows


def expert_colours(count: int) -> list[Colour]:
    """A colour for each expert: well apart up to 20, then along a spectrum."""
    if count <= len(_FEW):
        table = matplotlib.colors.to_rgba_array(_FEW[:count])
    elif count <= 20:
        table = matplotlib.colormaps["tab20"](np.arange(count))
    else:
        table = matplotlib.colormaps["nipy_spectral"](np.linspace(0.05, 0.95, count))
    return [(int(red), int(green), int(blue)) for red, green, blue in (table[:, :3] * 255).round()]
