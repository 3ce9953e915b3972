"""Which numbers of a record a tracker gets, and pictures of them.

Shapes: S scales, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from mepa_ds.runtime.trackers.tracker import Pixels

Chosen = Literal["short", "all"]

_SHORT = {
    "train": (
        "loss",
        "ce",
        "ce_last",
        "guidance_cosine",
        "balance",
        "max_expert_share",
        "lr",
        "grad_norm",
        "epoch",
        "images_per_second",
        "mfu",
        "skipped_steps",
    ),
    "heldout": ("ce", "ce_last", "accuracy"),
    "routing": ("collapsed_experts",),
}
_CELL = 24
_EVEN, _TWICE = np.array([255, 255, 255]), np.array([178, 24, 43])
_NONE = np.array([33, 102, 172])


def scalars(event: str, values: Mapping[str, Any], chosen: Chosen) -> dict[str, float]:
    """Returns the numbers of a record as `event/name`: those that say how a run is doing, or all of them.

    Of the scores of generated images (`score`) all that are single numbers are among the short ones.
    """
    if chosen == "all":
        return {f"{event}/{key}": value for key, value in _all(values)}
    names = tuple(values) if event == "score" else _SHORT.get(event, ())
    return {f"{event}/{name}": float(values[name]) for name in names if isinstance(values.get(name), (int, float))}


def _all(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields numbers by name. A list gives an entry per element: `ce_scale` of 3 scales is ce_scale/1 .. ce_scale/3."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _all(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            yield from _all({str(index): item for index, item in enumerate(value, start=1)}, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            yield prefix + key, value


def load_maps(routing: Mapping[str, Any]) -> dict[str, Pixels]:
    """Returns heat maps of a record `routing`: the experts' share by scale (mean over layers), and by layer.

    A row is a scale or a layer, a column an expert. White is an even share, red twice as much and more, blue none.
    """
    layers = list(routing["layers"].values())
    load_SE = np.mean([layer["load_scale"] for layer in layers], axis=0)
    load_NE = np.array([layer["load"] for layer in layers])
    return {"experts/by_scale": _heat_map(load_SE), "experts/by_layer": _heat_map(load_NE)}


def _heat_map(shares_RE: np.ndarray[Any, np.dtype[np.float64]]) -> Pixels:
    even = np.clip(shares_RE * shares_RE.shape[1], 0, 2)[..., None]
    colours = np.where(even > 1, _EVEN + (even - 1) * (_TWICE - _EVEN), _NONE + even * (_EVEN - _NONE))
    pixels_HW3 = np.round(colours).astype(np.uint8)
    return pixels_HW3.repeat(_CELL, axis=0).repeat(_CELL, axis=1)
