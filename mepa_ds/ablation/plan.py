"""From the file of an ablation to recipes and the table of runs."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import mepa_ds
from mepa_ds import shipped
from mepa_ds.ablation.config import AblationConfig
from mepa_ds.config.base import dump_yaml, read_yaml
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.files import write_json, write_text
from mepa_ds.scaling.running.run import Fleet
from mepa_ds.scaling.study import directory
from mepa_ds.scaling.study.plan import write_manifest
from mepa_ds.scaling.study.variants import plan_row, variant

FILE_NAME = "ablation.yaml"


def read_ablation(path: Path) -> AblationConfig:
    """Reads the file of an ablation, or the one in the output_dir of a planned one; see `directory.read_file`."""
    return directory.read_file(AblationConfig, path, FILE_NAME, "ablation")


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


def write_plan(ablation: AblationConfig) -> None:
    """Writes the ablation's file, a recipe for each run, the manifest and plan.json to its output_dir.

    Raises:
        UserError: see `make_plan`; or the directory holds another ablation.
    """
    out = ablation.output_dir
    check_directory(ablation)
    rows, recipes = make_plan(ablation)
    directory.write_recipes(out, recipes, set(recipes))
    write_text(out / FILE_NAME, dump_yaml(ablation))
    write_manifest(out, ablation.name, [Path(row["recipe"]) for row in rows])
    facts = {"ablation": ablation.name, "ablation_hash": ablation_hash(ablation), "code_version": mepa_ds.__version__}
    write_json(out / directory.PLAN_NAME, {**facts, "runs": rows})


def check_directory(ablation: AblationConfig) -> None:
    """Raises UserError when output_dir holds another ablation, or anything else that has runs."""
    directory.check_directory(ablation.output_dir, ablation.name, FILE_NAME, "ablation")


def ablation_hash(ablation: AblationConfig) -> str:
    """Returns a hash of what the runs are; where they are written, titles and comparisons do not count."""
    content = json.loads(ablation.model_dump_json(include={"name", "seeds", "flops_tolerance"}))
    content["arms"] = {name: arm.set for name, arm in ablation.arms.items()}
    content["base"] = read_yaml(shipped.find(ablation.base))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def read_plan(ablation: AblationConfig) -> list[dict[str, Any]]:
    """Returns the rows of the plan in the ablation's output_dir.

    Raises:
        UserError: there is none, or the file of the ablation has changed since.
    """
    check_directory(ablation)
    return directory.read_rows(ablation.output_dir, ablation_hash(ablation), "ablation", "mepa ablate")


def plan_if_needed(ablation: AblationConfig) -> None:
    """Writes the plan unless the output_dir has this very plan."""
    check_directory(ablation)
    with suppress(UserError):
        read_plan(ablation)
        return
    write_plan(ablation)


def fleet_of(ablation: AblationConfig) -> Fleet:
    """The runs of an ablation that is planned."""
    return Fleet(ablation.name, ablation.output_dir, ablation.ranks, rows=lambda: read_plan(ablation))
