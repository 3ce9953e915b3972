"""From a point of a study to a run: its recipe, its length, what it costs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mepa_ds import shipped
from mepa_ds.checkpoint.files import checkpoint_name
from mepa_ds.config.base import read_yaml, set_key, validate
from mepa_ds.config.model import ModelConfig, preset_values
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.models.summary import ParameterCounts, count_parameters
from mepa_ds.objective.flops import image_flops
from mepa_ds.runtime.schedule import base_lr_of, peak_lr, phase_steps
from mepa_ds.scaling.sizes import ladder_values, size_values
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.points import Point

_MOST_ROUNDED = 0.05  # of a length that the study file gives
_OWNED = {
    "model.depth": "grids.*.sizes", "model.width": "grids.*.sizes", "model.num_heads": "grids.*.sizes",
    "model.preset": "grids.*.sizes", "model.moe": "grids.*.moe", "seed": "seeds, or the base recipe",
    "train.steps": "grids.*.samples", "train.epochs": "grids.*.samples", "train.samples": "grids.*.samples",
    "optim.base_lr": "lr", "optim.mup_base_width": "lr.rule: mup", "output_dir": "output_dir",
    "data.unique_images": "grids.*.unique_images", "log.evaluate_every": "nothing: it follows from the length",
    "log.keep_steps": "schedule.branches", "branch_from": "schedule.branches",
    "guards.diverged_above": "diverged_above",
}  # fmt: skip
"""Keys of a recipe that the planner sets, and the study's keys for them."""
_DIVERGED = 1.5  # times the cross-entropy of a model that has learnt nothing


@dataclass(frozen=True)
class StudyRun:
    """One run of a study, with everything that its recipe says."""

    name: str
    point: Point
    config: PretrainConfig
    counts: ParameterCounts
    steps: int
    image_flops: float
    """Of one image, forward and backward, without the projector of semantic guidance."""
    trunk: str | None = None
    """wsd with branches: the run from which this one branches off."""
    first_step: int = 0
    """The step at which it branches off."""

    @property
    def batch(self) -> int:
        return self.config.train.global_batch

    @property
    def samples(self) -> int:
        """Images seen; whole steps, so not always what the study file says."""
        return self.steps * self.batch

    @property
    def tokens(self) -> int:
        return self.samples * self.config.model.schedule.num_tokens

    @property
    def flops(self) -> float:
        """Model FLOPs of training to the end, also of steps that are shared with a trunk."""
        return self.samples * self.image_flops

    @property
    def paid_flops(self) -> float:
        """Model FLOPs of the run's own steps."""
        return (self.steps - self.first_step) * self.batch * self.image_flops

    @property
    def lr_peak(self) -> float:
        return peak_lr(self.config.optim, self.batch)


class RunMaker:
    """Makes recipes. `lr_law` maps N (params_matrix) to the peak rate, for rule tuned; None: the sweep is not done."""

    def __init__(self, study: StudyConfig, lr_law: Mapping[str, float] | None = None):
        self._study, self._lr_law = study, lr_law
        for key in study.set:
            owner = next((own for own in _OWNED if key == own or key.startswith(f"{own}.")), None)
            if owner is not None:
                raise UserError(f"{study.name}: set: {key}: the planner sets it for each run; use {_OWNED[owner]}")
        self._base = _without_preset(read_yaml(shipped.find(study.base)), study)
        self._counts: dict[str, ParameterCounts] = {}

    def is_ready(self, point: Point) -> bool:
        """Whether the run's learning rate is known."""
        return self._study.lr.rule != "tuned" or point.lr_factor is not None or self._lr_law is not None

    def run(self, point: Point) -> StudyRun:
        """Raises UserError for what is wrong with the recipe that would result; the message names the run."""
        study, where = self._study, f"{self._study.name}: run {point.name}"
        values = self._values(point, where)
        config = validate(PretrainConfig, values, where)
        counts = self._count(config)
        flops_of_image = sum(image_flops(config.model).values())
        samples = point.samples
        if samples is None:
            assert point.flops is not None
            samples = max(round(point.flops / flops_of_image), 1)
        steps = round(samples / config.train.global_batch)
        if abs(steps * config.train.global_batch / samples - 1) > _MOST_ROUNDED:
            raise UserError(
                f"{where}: {samples} images are {samples / config.train.global_batch:.3g} steps of "
                f"{config.train.global_batch}: rounded to whole ones it would be another length; take more, or a "
                "smaller batch"
            )
        peak = self._peak_lr(point, counts.matrix, where)
        values["optim"] = (values.get("optim") or {}) | {"base_lr": base_lr_of(peak, config.train.global_batch)}
        values["train"] = {k: v for k, v in values["train"].items() if k not in ("epochs", "samples")} | {
            "steps": steps
        }
        values["output_dir"] = str(run_directory(study, point.name))
        # Of the last weights, once: the same for all lengths, and the study's losses are of these weights.
        values["log"] = (values.get("log") or {}) | {"evaluate_every": steps, "checkpoint_every": min(1000, steps)}
        limit = study.diverged_above or diverged_above(config.model)
        values["guards"] = (values.get("guards") or {}) | {"diverged_above": limit}
        config = validate(PretrainConfig, values, where)
        if config.data.heldout_tokens is None:
            raise UserError(
                f"{study.base}: data.heldout_tokens: a study's losses are of held-out images; name their set"
            )
        return StudyRun(point.name, point, config, counts, steps, flops_of_image)

    def _values(self, point: Point, where: str) -> dict[str, Any]:
        """Returns the base recipe with the point's settings, before its length and its rate."""
        values: dict[str, Any] = json.loads(json.dumps(self._base))
        for key, value in self._changes(point, where).items():
            set_key(values, key, value, f"{where}: {key}")
        return values

    def _changes(self, point: Point, where: str) -> dict[str, Any]:
        study = self._study
        try:
            size = size_values(point.size, study.head_width)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        changes: dict[str, Any] = {f"model.{key}": value for key, value in size.items()}
        if "adaln_gamma_init" not in self._base["model"]:
            changes |= {f"model.{key}": value for key, value in ladder_values(point.size).items()}
        changes |= study.set
        changes["model.moe"] = None if point.moe is None else point.moe.model_dump(mode="json")
        changes["seed"] = int(self._base.get("seed", 0)) + point.seed
        if point.batch is not None:
            changes["train.global_batch"] = point.batch
        if point.unique_images is not None:
            changes["data.unique_images"] = point.unique_images
        schedule = study.schedule
        for key, value in (
            ("schedule", schedule.kind),
            ("warmup_steps", schedule.warmup_steps),
            ("cooldown", schedule.cooldown),
        ):
            if value is not None:
                changes[f"optim.{key}"] = value
        if study.lr.rule == "mup":
            changes["optim.mup_base_width"] = study.lr.base_width
        return changes

    def _peak_lr(self, point: Point, matrix: int, where: str) -> float:
        lr = self._study.lr
        if point.lr_factor is not None:
            return lr.peak * point.lr_factor
        if lr.rule == "power":
            assert lr.reference is not None
            assert lr.exponent is not None
            reference = self.matrix_of(lr.reference, where)
            return lr.peak * (matrix / reference) ** lr.exponent
        if lr.rule == "tuned":
            # Until the sweep is done this stands in, for a plan's FLOPs and lengths.
            return lr.peak if self._lr_law is None else self._lr_law["k"] * matrix ** self._lr_law["a"]
        return lr.peak

    def matrix_of(self, size: str, where: str) -> int:
        """Returns params_matrix of the dense model of a size."""
        point = Point("", "fit", size, None, 1, None, None, None, 0)
        return self._count(validate(PretrainConfig, self._values(point, where), where)).matrix

    def _count(self, config: PretrainConfig) -> ParameterCounts:
        key = config.model.model_dump_json()
        if key not in self._counts:
            self._counts[key] = count_parameters(config.model)
        return self._counts[key]


def diverged_above(model: ModelConfig) -> float:
    """The mean cross-entropy above which a run counts as diverged, where the study does not say."""
    return _DIVERGED * math.log(model.codebook_size)


def _without_preset(base: dict[str, Any], study: StudyConfig) -> dict[str, Any]:
    """Returns the base recipe with the preset's scales and AdaLN written out, but not its size and its experts."""
    model = base.get("model") or {}
    if not isinstance(model, dict):
        raise UserError(f"{study.base}: model: expected a section")
    preset = model.get("preset")
    try:
        values = preset_values(str(preset)) if preset is not None else {}
    except ValueError as error:
        raise UserError(f"{study.base}: model.preset: {error}") from None
    kept = {key: value for key, value in values.items() if key not in ("depth", "adaln_gamma_init", "moe")}
    return base | {"model": kept | {key: value for key, value in model.items() if key != "preset"}}


def run_directory(study: StudyConfig, name: str) -> Path:
    return study.output_dir / "runs" / name


def recipe_path(study: StudyConfig, name: str) -> Path:
    return study.output_dir / "recipes" / f"{name}.yaml"


def with_branches(study: StudyConfig, runs: list[StudyRun]) -> list[StudyRun]:
    """Makes runs that differ in their length alone branches of the longest of them (schedule wsd).

    The trunk keeps a checkpoint at the step at which each shorter run's cooldown begins.

    Raises:
        UserError: a cooldown would begin within the warm-up.
    """
    if not study.schedule.branches:
        return runs
    families: dict[str, list[StudyRun]] = {}
    for run in runs:
        key = replace(run.point, samples=0, flops=0.0, group="", role="fit")
        families.setdefault(repr(key) + repr(run.lr_peak), []).append(run)
    changed: dict[str, StudyRun] = {}
    for family in families.values():
        *shorter, trunk = sorted(family, key=lambda run: run.steps)
        _, stable = _stable_steps(trunk)
        points = []
        for run in shorter:
            warmed_up, first = _stable_steps(run)
            if first <= warmed_up:
                raise UserError(
                    f"{study.name}: run {run.name}: its cooldown would begin at step {first}, within the warm-up; take "
                    "fewer schedule.warmup_steps or longer runs"
                )
            if first > stable:  # nearly as long as the trunk, whose cooldown has begun by then
                continue
            points.append(first)
            source = run_directory(study, trunk.name) / "checkpoints" / checkpoint_name(first)
            changed[run.name] = _with(study, run, {"branch_from": str(source)}, trunk=trunk.name, first_step=first)
        if points:
            changed[trunk.name] = _with(study, trunk, {"log": {"keep_steps": sorted(set(points))}})
    return [changed.get(run.name, run) for run in runs]


def _stable_steps(run: StudyRun) -> tuple[int, int]:
    """Returns where the warm-up ends and where the cooldown begins, in steps."""
    warmup, cooldown = phase_steps(run.config.optim, run.steps)
    return warmup, run.steps - cooldown


def _with(study: StudyConfig, run: StudyRun, values: dict[str, Any], **facts: Any) -> StudyRun:
    recipe = json.loads(run.config.model_dump_json())
    for key, value in values.items():
        recipe[key] = recipe[key] | value if isinstance(value, dict) else value
    return replace(run, config=validate(PretrainConfig, recipe, f"{study.name}: run {run.name}"), **facts)
