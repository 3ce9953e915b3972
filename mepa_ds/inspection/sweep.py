"""The same samples at several weights of classifier-free guidance and several top-k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mepa_ds.files import write_json
from mepa_ds.images.pictures import save_png, to_uint8
from mepa_ds.images.sheets import Pixels, draw_sheet
from mepa_ds.inspection.subject import Drawn, Picture, Subject
from mepa_ds.inspection.tracing import Sampling, draw

CFGS = (0.0, 1.5, 3.0, 5.0)
_ACROSS = 2
_GAP, _LINE = 1, 160  # between the images of a tile: a grey line
MOST_CLASSES = _ACROSS * _ACROSS


def default_top_ks(codebook_size: int) -> tuple[int, ...]:
    """From greedy to the whole codebook; VAR's 900 among them where the codebook is that large."""
    between = (100, 900) if codebook_size > 900 else (max(codebook_size // 16, 2), max(codebook_size // 4, 3))
    return tuple(sorted({1, *between, codebook_size}))


def draw_sweep(
    subject: Subject,
    classes: Sequence[int],
    grid: tuple[Sequence[float], Sequence[int]],
    sampling: Sampling,
    directory: Path,
    on_images: Callable[[int], object],
) -> Drawn:
    """Writes sweep.png and .json: a tile holds one sample of up to four classes, the same seed in all."""
    classes = list(classes[:MOST_CLASSES])
    cfgs, top_ks = grid
    tiles: list[list[Pixels]] = []
    cells = []
    for cfg in cfgs:
        tiles.append([])
        for top_k in top_ks:
            pixels_BHW3 = to_uint8(draw(subject, classes, replace(sampling, cfg=cfg, top_k=top_k)))
            on_images(len(classes))
            tiles[-1].append(block_of(pixels_BHW3))
            cells.append({"cfg": cfg, "top_k": top_k, **_statistics(pixels_BHW3)})
    names = ", ".join(subject.caption(label) for label in classes)
    sheet = draw_sheet(
        tiles,
        title=f"Guidance by top-k: {names}; top-p {sampling.top_p:g}, seed {sampling.seed}{subject.which(classes)}",
        columns=[f"top-k {top_k}" for top_k in top_ks],
        rows=[f"cfg {cfg:g}" for cfg in cfgs],
        least_side=128,
    )
    path = directory / "sweep.png"
    save_png(sheet.pixels_HW3, path)
    settings = {"classes": classes, "top_p": sampling.top_p, "seed": sampling.seed}
    write_json(path.with_suffix(".json"), {**settings, "cells": cells})
    shows = (
        f"a row for each guidance weight, a column for each top-k; a tile has one sample each of {names}, drawn with "
        "the same random numbers everywhere"
    )
    return [Picture(path, shows, path.with_suffix(".json"))]


def block_of(pixels_BHW3: NDArray[np.uint8]) -> Pixels:
    """Up to four images as one tile, two a row."""
    rows = -(-len(pixels_BHW3) // _ACROSS)
    across = min(len(pixels_BHW3), _ACROSS)
    _, height, width, _ = pixels_BHW3.shape
    step = (height + _GAP, width + _GAP)
    tile = np.full((rows * step[0] - _GAP, across * step[1] - _GAP, 3), _LINE, np.uint8)
    for number, pixels_HW3 in enumerate(pixels_BHW3):
        top, left = number // across * step[0], number % across * step[1]
        tile[top : top + height, left : left + width] = pixels_HW3
    return tile


def _statistics(pixels_BHW3: NDArray[np.uint8]) -> dict[str, float]:
    """Too much guidance shows in these first: brightness, contrast and colour, in 0 to 1."""
    pixels = pixels_BHW3.astype(np.float64) / 255
    return {
        "mean": round(float(pixels.mean()), 5),
        "contrast": round(float(pixels.std((1, 2, 3)).mean()), 5),
        "saturation": round(float((pixels.max(-1) - pixels.min(-1)).mean()), 5),
    }
