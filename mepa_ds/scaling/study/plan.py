"""`mepa scale plan`: from a study file to recipes, a manifest and the table of runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mepa_ds
from mepa_ds import shipped
from mepa_ds.config.base import dump_yaml, read_yaml, validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.shards.index import INDEX_NAME, ShardIndex
from mepa_ds.errors import UserError
from mepa_ds.files import write_json, write_text
from mepa_ds.safety.reading import read_json_object
from mepa_ds.scaling.study import directory
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.costs import check_budget, hours_of, memory_of
from mepa_ds.scaling.study.design import check_design, check_different, warnings_of
from mepa_ds.scaling.study.expected import expected_intervals
from mepa_ds.scaling.study.points import points_of
from mepa_ds.scaling.study.runs import RunMaker, StudyRun, recipe_path, run_directory, with_branches

STUDY_NAME, LR_LAW_NAME = "study.yaml", "lr_law.json"


@dataclass(frozen=True)
class StudyPlan:
    """A planned study. Runs that wait for the sweep are planned at lr.peak; `waiting` has their names."""

    study: StudyConfig
    runs: tuple[StudyRun, ...]
    waiting: frozenset[str]
    memory: dict[str, float]
    """Bytes of a rank at its peak, by run; empty if it was not asked for."""
    expected: dict[str, Any]
    """See `expected_intervals`."""
    warnings: tuple[str, ...]

    def ready(self) -> list[StudyRun]:
        """Returns the runs whose recipes are final."""
        return [run for run in self.runs if run.name not in self.waiting]


def read_study(path: Path) -> StudyConfig:
    """Reads a study file, or the study file in the output_dir of a planned study; see `directory.read_file`."""
    return directory.read_file(StudyConfig, path, "study")


def make_plan(study: StudyConfig, with_memory: bool = True) -> StudyPlan:
    """Multiplies the study out and checks it. Writes nothing.

    Raises:
        UserError: a recipe is wrong, two runs are the same, a run does not fit in memory, the budget is exceeded, or
            the design cannot carry one of the study's laws.
    """
    maker = RunMaker(study, read_lr_law(study))
    points = points_of(study)
    runs = with_branches(study, [maker.run(point) for point in points])
    check_different(study, runs)
    check_design(study, runs)
    check_budget(study, runs)
    return StudyPlan(
        study=study,
        runs=tuple(runs),
        waiting=frozenset(point.name for point in points if not maker.is_ready(point)),
        memory=memory_of(study, runs) if with_memory else {},
        expected=expected_intervals(study, runs),
        warnings=tuple(warnings_of(study, runs)),
    )


def read_lr_law(study: StudyConfig) -> dict[str, Any] | None:
    """Returns the law of the study's sweep (rule tuned); None for other rules, and while the sweep is not done."""
    path = study.output_dir / LR_LAW_NAME
    if study.lr.rule != "tuned" or not path.is_file():
        return None
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, and mepa scale run fits it again") from None


def check_directory(study: StudyConfig) -> None:
    """Raises UserError when output_dir holds another study."""
    directory.check_directory(study.output_dir, study.name, "study")


def write_plan(plan: StudyPlan) -> None:
    """Writes study.yaml, a recipe for each run that is ready, the manifest and plan.json to the study's output_dir."""
    study = plan.study
    check_directory(study)
    recipes = {run.name: run.config for run in plan.ready()}
    directory.write_recipes(study.output_dir, recipes, {run.name for run in plan.runs})
    write_text(study.output_dir / STUDY_NAME, dump_yaml(study))
    write_manifest(study.output_dir, study.name, [recipe_path(study, run.name) for run in plan.ready()])
    write_json(study.output_dir / directory.PLAN_NAME, plan_facts(plan))


def write_manifest(output_dir: Path, name: str, recipes: Sequence[Path]) -> Path:
    """Writes a line for each recipe, as `mepa slurm submit --job scaling-study` reads them; returns the path.

    The file has the study's name, and so have the jobs.
    """
    path = output_dir / f"{name}.txt"
    write_text(path, "".join(f"{recipe}\n" for recipe in recipes))
    return path


def plan_facts(plan: StudyPlan) -> dict[str, Any]:
    """Returns the plan as JSON has it: `runs` with a row each, `expected`, `warnings`, and totals."""
    study = plan.study
    rows = [_row(plan, run) for run in plan.runs]
    hours = [row["device_hours"] for row in rows if row["device_hours"] is not None]
    price = study.budget.price
    return {
        "study": study.name,
        "study_hash": study_hash(study),
        "code_version": mepa_ds.__version__,
        "runs": rows,
        "total_flops": sum(run.paid_flops for run in plan.runs),
        "total_device_hours": sum(hours) if hours else None,
        "total_price": sum(hours) * price if hours and price is not None else None,
        "expected": plan.expected,
        "warnings": list(plan.warnings),
    }


def study_hash(study: StudyConfig) -> str:
    """Returns a hash of what the runs are; where they are written and what they cost do not count."""
    content = json.loads(study.model_dump_json(exclude={"output_dir", "base", "budget", "prior", "laws"}))
    content["base"] = read_yaml(shipped.find(study.base))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _row(plan: StudyPlan, run: StudyRun) -> dict[str, Any]:
    study, model = plan.study, run.config.model
    hours = hours_of(run, study.budget)
    images = unique_images(run)
    return {
        "run": run.name,
        "group": run.point.group,
        "role": run.point.role,
        "waits_for_sweep": run.name in plan.waiting,
        "size": run.point.size,
        "kind": "dense" if run.point.moe is None else "moe",
        "num_experts": model.moe.num_experts if model.moe else None,
        "params_total": run.counts.total,
        "params_active": run.counts.active,
        "params_matrix": run.counts.matrix,
        "batch": run.batch,
        "steps": run.steps,
        "samples": run.samples,
        "tokens": run.tokens,
        "unique_images": images,
        "epochs": None if images is None else run.samples / images,
        "lr_peak": run.lr_peak,
        "seed": run.config.seed,
        "branches_off": run.trunk,
        "first_step": run.first_step,
        "flops": run.flops,
        "paid_flops": run.paid_flops,
        "device_hours": hours,
        "price": hours * study.budget.price if hours is not None and study.budget.price is not None else None,
        "memory_bytes": plan.memory.get(run.name),
        "recipe": str(recipe_path(study, run.name)),
        "output_dir": str(run_directory(study, run.name)),
    }


def unique_images(run: StudyRun) -> int | None:
    """Returns how many images the run trains on; None while the set is not there."""
    if run.point.unique_images is not None:
        return run.point.unique_images
    samples = run.config.data.tokens or run.config.data.images
    if samples is None or not (samples / INDEX_NAME).is_file():
        return None
    return ShardIndex.read(samples).num_samples


def read_plan(study: StudyConfig) -> list[dict[str, Any]]:
    """Returns the rows of the plan that was written to the study's output_dir.

    Raises:
        UserError: there is none, or it is of another study, or the study file has changed since.
    """
    check_directory(study)
    return directory.read_rows(study.output_dir, study_hash(study), "study", "mepa scale plan")


def resolved(row: Mapping[str, Any]) -> PretrainConfig:
    """Returns the recipe of a planned run."""
    return validate(PretrainConfig, read_yaml(Path(row["recipe"])), row["recipe"])
