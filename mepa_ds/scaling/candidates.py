"""Models that could be trained, with their counted FLOPs: the sizes of a study, or of VAR's ladder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mepa_ds.config.model import MoEConfig
from mepa_ds.scaling.family import VAR_DEPTHS, family_row, member
from mepa_ds.scaling.sizes import VAR_HEAD_WIDTH, is_of_ladder
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.points import Point
from mepa_ds.scaling.study.runs import RunMaker

_ANY_LENGTH = 10**9  # images; the recipe is made for its rate, batch and size alone


@dataclass(frozen=True)
class FamilyModel:
    """A model that could be trained."""

    size: str
    params_matrix: int
    params_active: int
    params_total: int
    experts: int
    """E; 1 for dense."""
    image_flops: float
    """Counted, of one image, forward and backward, with the head and the attention."""
    image_tokens: int
    batch: int | None = None
    """Images a step; None: unknown, so lengths are not rounded to whole steps."""
    lr_peak: float | None = None


def study_sizes(study: StudyConfig) -> tuple[str, ...]:
    """Returns the sizes of a study; those of VAR's ladder all of it, if the study's are of it."""
    grids = [*study.grids.values(), *([study.hold_out] if study.hold_out else [])]
    sizes = list(dict.fromkeys(size for grid in grids for size in grid.sizes))
    if all(map(is_of_ladder, sizes)):
        sizes = list(dict.fromkeys([*sizes, *(f"d{depth}" for depth in VAR_DEPTHS)]))
        sizes.sort(key=lambda size: int(size[1:].split("h")[0]))
    return tuple(sizes)


def study_moe(study: StudyConfig) -> MoEConfig | None:
    """Returns the experts of a study's predictions: none if any grid is dense, else the first there are."""
    found = [moe for grid in study.grids.values() for moe in grid.moe]
    return None if None in found else found[0]


def study_models(
    study: StudyConfig, sizes: Sequence[str], moe: MoEConfig | None, lr_law: Mapping[str, float] | None = None
) -> list[FamilyModel]:
    """Returns the models of sizes, as the study would train them: its base recipe, its batch, its rule of the rate.

    `lr_law`: of the study's sweep, for rule tuned; without it these models have no rate.
    """
    maker = RunMaker(study, lr_law)
    models = []
    for size in sizes:
        point = Point("predict", "fit", size, moe, _ANY_LENGTH, None, None, None, 0)
        run = maker.run(point)
        models.append(
            FamilyModel(
                size=size,
                params_matrix=run.counts.matrix,
                params_active=run.counts.active,
                params_total=run.counts.total,
                experts=moe.num_experts if moe else 1,
                image_flops=run.image_flops,
                image_tokens=run.config.model.schedule.num_tokens,
                batch=run.batch,
                lr_peak=run.lr_peak if maker.is_ready(point) else None,
            )
        )
    return models


def family_models(
    sizes: Sequence[str], moe: MoEConfig | None, settings: Mapping[str, Any], head_width: int = VAR_HEAD_WIDTH
) -> list[FamilyModel]:
    """Returns the models of sizes without a study: VAR's settings, or `settings`, further keys of a recipe's model."""
    models = []
    for size in sizes:
        model = member(size, moe, head_width, dict(settings))
        row = family_row(size, model)
        models.append(
            FamilyModel(
                size=size,
                params_matrix=row["params_matrix"],
                params_active=row["params_active"],
                params_total=row["params_total"],
                experts=moe.num_experts if moe else 1,
                image_flops=row["flops_image"],
                image_tokens=row["tokens"],
            )
        )
    return models
