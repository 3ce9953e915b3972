"""From the file of an ablation to recipes and the table of runs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from mepa_ds import shipped
from mepa_ds.ablation.config import AblationConfig
from mepa_ds.config.base import read_yaml
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.scaling.running.planned import Planned
from mepa_ds.scaling.study import directory
from mepa_ds.scaling.study.variants import plan_row, variant


def read_ablation(path: Path) -> AblationConfig:
    """Reads the file of an ablation, or the one in the output_dir of a planned one; see `directory.read_file`."""
    return directory.read_file(AblationConfig, path, "ablation")


def make_plan(ablation: AblationConfig) -> tuple[list[dict[str, Any]], dict[str, PretrainConfig]]:
    """Multiplies the ablation out and checks it: a row for each run, and the recipes by run. Writes nothing.

    Seeds come first, so that a part of the runs already compares all arms.

    Raises:
        UserError: a recipe is wrong, two arms are the same, or an arm has other active FLOPs than the baseline.
    """
    base = read_yaml(shipped.find(ablation.base))
    rows: list[dict[str, Any]] = []
    recipes: dict[str, PretrainConfig] = {}
    for number in range(ablation.seeds):
        for arm in ablation.arms:
            name = f"{arm}-s{number}"
            where, out = f"{ablation.name}: arm {arm}", ablation.output_dir
            recipes[name] = config = variant(base, ablation.arms[arm].set, number, out / "runs" / name, where)
            rows.append(plan_row(name, config, out / "recipes" / f"{name}.yaml") | {"arm": arm})
    _check_arms(ablation, {row["arm"]: (row, recipes[row["run"]]) for row in rows[: len(ablation.arms)]})
    return rows, recipes


def _check_arms(ablation: AblationConfig, first: dict[str, tuple[dict[str, Any], PretrainConfig]]) -> None:
    """`first`: the first run of each arm."""
    wanted = first[ablation.baseline][0]["flops_image"]
    seen: dict[str, str] = {}
    for arm, (row, config) in first.items():
        ratio = row["flops_image"] / wanted
        if abs(ratio - 1) > ablation.flops_tolerance:
            raise UserError(
                f"{ablation.name}: arm {arm}: its active FLOPs are {ratio:.3f} of {ablation.baseline}'s, and "
                f"flops_tolerance is {ablation.flops_tolerance}; with top_k experts and a shared one, "
                "model.moe.expert_ratio: ffn_ratio / (top_k + 1) costs what a dense FFN costs"
            )
        key = config.model_dump_json(exclude={"output_dir", "seed", "log"})
        if key in seen:
            raise UserError(f"{ablation.name}: the arms {seen[key]} and {arm} are the same: leave one of them out")
        seen[key] = arm


def planned(ablation: AblationConfig) -> Planned:
    """The ablation's plan. Titles and comparisons are no part of what its runs are."""
    content = json.loads(ablation.model_dump_json(include={"name", "seeds", "flops_tolerance"}))
    content["arms"] = {name: arm.set for name, arm in ablation.arms.items()}
    place = (ablation.name, ablation.base, ablation.output_dir, ablation.ranks)
    return Planned("ablation", "mepa ablate", ablation, *place, content, partial(make_plan, ablation))
