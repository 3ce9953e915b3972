"""The runs of a study: its grids, seeds, sweep and held-out points, multiplied out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from mepa_ds.config.model import MoEConfig
from mepa_ds.errors import UserError
from mepa_ds.scaling.study.config import Grid, StudyConfig

Role = Literal["fit", "lr", "hold_out"]
_DEFAULT_MOE = MoEConfig()


@dataclass(frozen=True)
class Point:
    """One run, before its recipe is made. Its name says what distinguishes it within the study."""

    group: str
    role: Role
    """fit; lr: only for the law of the learning rate; hold_out: no fit sees it."""
    size: str
    moe: MoEConfig | None
    samples: int | None
    flops: float | None
    """The budget that the length is to cost, where the grid gives that in place of samples."""
    unique_images: int | None
    batch: int | None
    seed: int
    """Added to the base recipe's."""
    lr_factor: float | None = None
    """A run of the sweep: its peak rate as a multiple of lr.peak. None: the rate of the study's rule."""

    @property
    def name(self) -> str:
        parts = [self.size]
        if self.moe is not None:
            parts.append(moe_name(self.moe))
        parts.append(f"n{self.samples}" if self.samples is not None else f"c{self.flops:g}".replace("+", ""))
        if self.unique_images is not None:
            parts.append(f"u{self.unique_images}")
        if self.batch is not None:
            parts.append(f"b{self.batch}")
        if self.lr_factor is not None:
            parts.append(f"lr{self.lr_factor:g}")
        if self.seed:
            parts.append(f"seed{self.seed}")
        return "-".join(parts)


def moe_name(moe: MoEConfig) -> str:
    """Returns a short name: e8k2 is 8 experts, top-2; x1.33 their hidden width in C; s1 a shared expert."""
    known = {"num_experts", "top_k", "expert_ratio", "shared_expert"}
    name = f"e{moe.num_experts}k{moe.top_k}x{moe.expert_ratio:.3g}s{int(moe.shared_expert)}"
    other = {key: value for key, value in moe.model_dump().items() if key not in known}
    if other != {key: value for key, value in _DEFAULT_MOE.model_dump().items() if key not in known}:
        name += "-" + hashlib.sha256(json.dumps(other, sort_keys=True).encode()).hexdigest()[:4]
    return name


def points_of(study: StudyConfig) -> list[Point]:
    """Returns all runs of a study, each once; sweeps and seeds share runs with the grids where they coincide.

    Raises:
        UserError: two grids have a run in common, or a repeated or held-out point does not fit the grids.
    """
    found: dict[str, Point] = {}
    for group, grid in study.grids.items():
        for point in _multiply(grid, group, "fit"):
            _add(found, point, f"grids.{group}")
    if study.seeds is not None:
        for point in _multiply(study.seeds.at, "seeds", "fit"):
            if point.name not in found:
                raise UserError(f"seeds.at: {point.name} is in no grid; only runs of the grids can be repeated")
            for seed in range(1, study.seeds.count):
                repeated = replace(point, seed=seed, group=found[point.name].group)
                _add(found, repeated, "seeds")
    if study.lr.sweep is not None:
        sweep = study.lr.sweep
        grid = Grid(sizes=sweep.sizes, moe=sweep.moe, samples=sweep.samples)
        for point in _multiply(grid, "lr", "lr"):
            for factor in sweep.factors:
                # This is the grid's own run, unless the rule is to give that one another rate.
                if factor == 1.0 and point.name in found and study.lr.rule != "tuned":
                    continue
                _add(found, replace(point, lr_factor=factor), "lr.sweep")
    if study.hold_out is not None:
        for point in _multiply(study.hold_out, "hold_out", "hold_out"):
            _add(found, point, "hold_out")
    return list(found.values())


def _add(found: dict[str, Point], point: Point, where: str) -> None:
    if point.name in found:
        raise UserError(
            f"{where}: the run {point.name} is the same as one of {found[point.name].group}; leave one of them out"
        )
    found[point.name] = point


def _multiply(grid: Grid, group: str, role: Role) -> Iterator[Point]:
    for batch in grid.batch or (None,):
        for unique in grid.unique_images:
            for moe in grid.moe:
                for size in grid.sizes:
                    for samples in grid.samples or ():
                        yield Point(group, role, size, moe, samples, None, unique, batch, 0)
                    for flops in grid.flops or ():
                        yield Point(group, role, size, moe, None, flops, unique, batch, 0)
