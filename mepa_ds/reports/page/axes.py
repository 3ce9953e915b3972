"""What a curve is drawn against: steps, images, FLOPs and hours of training.

Shapes: N training records, P points.
"""

from __future__ import annotations

import numpy as np

from mepa_ds.reports.page.series import rounded
from mepa_ds.reports.records import Column, RunRecords, number_of

AXES = {"steps": "steps", "images": "images", "flops": "model FLOPs", "hours": "hours of training"}
"""Names of axes, and what they are called on the page."""


class RunAxes:
    """The place of any step of a run on each axis, from its training records.

    Hours are those of the steps alone, by their mean between two records: evaluations, checkpoints, pictures, waiting
    in a queue and steps that were taken again are not among them.
    """

    def __init__(self, records: RunRecords):
        train, steps = records.train, records.steps
        starts = records.of("start")
        first = float(starts[0]["step"]) if starts else 0.0
        taken = np.diff(steps, prepend=min(first, steps[0]))
        # A branch begins at its trunk's step, but has done none of the trunk's work itself.
        self._steps = np.concatenate([[steps[0] - taken[0]], steps])
        images = train.get("images", train.get("samples"))
        self._known: dict[str, Column] = {}
        if images is not None:
            per_step = (images[-1] - images[0]) / (steps[-1] - steps[0]) if len(steps) > 1 else images[0] / steps[0]
            self._known["images"] = np.concatenate([[max(images[0] - taken[0] * per_step, 0.0)], images])
        seconds = _step_seconds(train, taken, images)
        if seconds is not None:
            self._known["hours"] = _summed(taken * seconds / 3600)
        if (step_flops := _step_flops(records, seconds)) is not None:
            self._known["flops"] = _summed(taken * step_flops)

    @property
    def names(self) -> list[str]:
        return [name for name in AXES if name == "steps" or name in self._known]

    def at(self, steps: Column) -> dict[str, list[float | int | None]]:
        """Returns (P,) places of steps on each axis."""
        places = {"steps": rounded(steps, 12)}
        for name, values in self._known.items():
            places[name] = rounded(np.interp(steps, self._steps, values), 7)
        return places

    def total(self, name: str) -> float | None:
        """Returns where the last record stands on an axis; None if that is not known."""
        if name == "steps":
            return float(self._steps[-1])
        values = self._known.get(name)
        return None if values is None else float(values[-1])


def _step_seconds(train: dict[str, Column], taken: Column, images: Column | None) -> Column | None:
    if "mean_step_seconds" in train:
        return train["mean_step_seconds"]
    speed = train.get("images_per_second")
    if speed is None or images is None:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.diff(images, prepend=0.0) / np.where(taken > 0, taken, np.nan) / speed


def _step_flops(records: RunRecords, seconds: Column | None) -> Column | None:
    """Of a step, mean between two records (scales that join later make later steps dearer)."""
    if "flops_per_second" in records.train and seconds is not None:
        return records.train["flops_per_second"] * seconds
    found = [number_of(start.get("step_flops")) for start in records.of("start")]
    if not found or found[-1] is None:
        return None
    return np.full(len(records.steps), found[-1])


def _summed(parts: Column) -> Column:
    return np.concatenate([[0.0], np.cumsum(np.nan_to_num(parts))])
