"""The experts' load over a run, as frames of heat maps.

Shapes: R frames, N MoE layers, S scales, E experts.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mepa_ds.reports.page.series import spread
from mepa_ds.reports.records import RunRecords

_LINE_RECORDS, _MOST_FRAMES, _FEWEST_FRAMES = 120, 60, 6
_PER_SCALE = ("entropy", "load_variance", "dropped")
_NAMES = {"load_variance": "variance"}


@dataclass(frozen=True)
class ExpertLoad:
    """What the page shows of a run's routing records.

    Attributes:
        lines: (step, numbers) of each record that was read: `entropy/1` of scale 1, ..., mean over layers.
        frames: for the page: steps, layers, scales, experts, and the loads (R, N, S, E), or (R, S, E) and (R, N, E)
            where all of them were too many.
        note: what was left out; "" for nothing.
    """

    lines: list[tuple[int, dict[str, float]]]
    frames: dict[str, Any] | None
    note: str


def expert_load(records: RunRecords, budget: int) -> ExpertLoad:
    """Reads up to 120 of a run's routing records, evenly spread. `budget`: bytes for the frames, about."""
    places = spread(records.routing, _LINE_RECORDS)
    found = records.routing_records(places)
    if not found:
        return ExpertLoad([], None, "")
    layers = list(found[-1]["layers"])
    found = [record for record in found if list(record["layers"]) == layers]
    lines = [(record["step"], _means(record)) for record in found]
    loads = [np.array([layer["load_scale"] for layer in record["layers"].values()]) for record in found]
    fitting = [number for number, load_NSE in enumerate(loads) if load_NSE.shape == loads[-1].shape]
    # Loads take a byte each: the root of the share, since small ones are to be told apart.
    size = loads[-1].size
    whole = budget // size >= _FEWEST_FRAMES
    layers_, scales, experts = loads[-1].shape
    count = budget // (size if whole else (layers_ + scales) * experts)
    chosen = spread(fitting, min(max(count, _FEWEST_FRAMES), _MOST_FRAMES))
    stack_RNSE = np.stack([loads[number] for number in chosen])
    total_RNE = np.stack([_of_layers(found[number]) for number in chosen])
    frames = {
        "steps": [found[number]["step"] for number in chosen],
        "layers": layers, "scales": scales, "experts": experts, "whole": whole,
        "load": _coded(stack_RNSE if whole else stack_RNSE.mean(1)), "total": _coded(total_RNE),
    }  # fmt: skip
    return ExpertLoad(lines, frames, _note(records, found, chosen, whole))


def _note(records: RunRecords, found: list[Any], chosen: Sequence[int], whole: bool) -> str:
    notes = []
    if len(records.routing) > len(chosen):
        notes.append(f"The heat maps show {len(chosen)} of the run's {len(records.routing)} routing records.")
    if len(records.routing) > len(found):
        notes.append(f"The curves of experts have {len(found)} of them.")
    if not whole:
        notes.append("There are too many layers, scales and experts for a map of each layer: maps by scale are means.")
    return " ".join(notes)


def _means(record: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in _PER_SCALE:
        rows = [layer[f"{name}_scale"] for layer in record["layers"].values() if f"{name}_scale" in layer]
        if rows:
            means = np.mean(np.array(rows, dtype=float), axis=0)
            found |= {f"{_NAMES.get(name, name)}/{scale}": float(mean) for scale, mean in enumerate(means, start=1)}
    return found


def _of_layers(record: dict[str, Any]) -> NDArray[np.float64]:
    """(N, E) the load over all scales."""
    return np.array([layer["load"] for layer in record["layers"].values()])


def _coded(shares: NDArray[Any]) -> str:
    return base64.b64encode(np.round(255 * np.sqrt(shares.clip(0, 1))).astype(np.uint8).tobytes()).decode()
