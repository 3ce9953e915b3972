"""`mepa slurm pipeline`: shards, tokenizer and teacher, tokens and features, pretraining, samples, scores as one chain.

Every stage waits for the success of the stage before. After an array a job names the members that failed; the chain
then stops there, and the same command again starts only what is not done.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from mepa_ds import log, shipped
from mepa_ds.config.base import Section, load_config
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.config.values import PositiveInt, UserPath
from mepa_ds.errors import UserError
from mepa_ds.slurm.checks import check_exists, check_paths
from mepa_ds.slurm.command_words import command_words, path_words
from mepa_ds.slurm.in_job.parts import array_of, open_parts
from mepa_ds.slurm.in_job.recipe_value import recipe_paths, recipe_value
from mepa_ds.slurm.jobs import Job, sbatch_command, submit, test_only
from mepa_ds.slurm.profile import Profile, root
from mepa_ds.slurm.submit import (
    Request,
    asks_slurm,
    cancelled_on_error,
    check_cluster,
    check_recipe,
    is_finished,
    output_dir,
    refuse_while_active,
)

Tool = Literal["build_shards", "precompute", "sample"]


class ArrayConfig(Section):
    """Commands that each run as a job array."""

    commands: tuple[str, ...]
    """Words of mepa data build or mepa data precompute; the commands of a stage run side by side."""
    parts: PositiveInt = 1
    """Members of each array."""
    cpus: PositiveInt = 8
    """CPUs of a member without a GPU."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of a member; 0: none."""


class TrainingConfig(Section):
    """A training run."""

    recipe: Annotated[UserPath, AfterValidator(shipped.find)]
    """YAML file."""
    overrides: tuple[str, ...] = ()
    """key=value words."""
    nodes: PositiveInt = 1
    """Nodes, each with the cluster profile's GPUs."""


class EvaluateConfig(Section):
    """Scores of the samples, computed on one GPU."""

    reference: UserPath
    """Real images, such as ADM's VIRTUAL_imagenet256_labeled.npz."""
    inception: UserPath
    """torch-fidelity's weights-inception-2015-12-05-6726825d.pth."""


class SamplesConfig(Section):
    """Images for an evaluation, drawn by a job array and packed into samples.npz."""

    parts: PositiveInt = 1
    """Members of the array, each with one GPU."""
    per_class: PositiveInt = 50
    """Images of each class."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The samples are a function of seed and parts."""
    weights: Literal["best", "last"] = "best"
    """Weights of lowest held-out cross-entropy, or of the last step."""
    options: str = ""
    """More options of `mepa sample`, such as --cfg 1.5 --top-k 900."""
    evaluate: EvaluateConfig | None = None
    """`mepa evaluate` of the packed samples; null: they are only packed."""


class PipelineConfig(Section):
    """All stages; those that are null are left out."""

    shards: ArrayConfig | None = None
    """mepa data build"""
    tokenizer: TrainingConfig | None = None
    """mepa train-tokenizer"""
    teacher: ArrayConfig | None = None
    """mepa data precompute fit-teacher"""
    precompute: ArrayConfig | None = None
    """mepa data precompute tokens and features"""
    pretrain: TrainingConfig
    """pretrain.py"""
    samples: SamplesConfig | None = None
    """mepa sample, mepa evaluate"""


@dataclass(frozen=True)
class Stage:
    """Jobs that run side by side; those that are arrays each have a job that checks the array."""

    name: str
    jobs: tuple[tuple[Job, Job | None], ...]


CheckWords = Callable[[Tool, list[str]], None]
"""Raises UserError for words that a tool does not accept."""


def run_pipeline(path: Path, profile: Profile, dry_run: bool, check_words: CheckWords) -> list[str]:
    """Checks all stages, then submits what is not done; returns the numbers of the jobs.

    Raises:
        UserError: something does not fit, or an earlier start is still at work; nothing was submitted.
    """
    config = load_config(PipelineConfig, path)
    request = _request(config.pretrain, "pretrain")
    run = output_dir(request)
    record = run / "slurm"
    asks = asks_slurm(profile, dry_run)
    if asks:
        refuse_while_active(record)
    stages = [stage for stage in _stages(config, run) if stage.jobs]
    if not stages:
        log.say(f"{run}: all stages are done")
        return []
    check_cluster(profile, max(config.pretrain.nodes, config.tokenizer.nodes if config.tokenizer else 1), asks)
    _check_words(config, check_words)
    _check_inputs(config, request, profile)
    for stage in stages:
        for job, check in stage.jobs:
            for planned in (job, check):
                if planned is not None and asks:
                    test_only(sbatch_command(planned, profile))
    return _submit_all(stages, profile, record, dry_run)


def _check_words(config: PipelineConfig, check: CheckWords) -> None:
    """Checks all commands now. A mistake in the last stage would otherwise be found after days of training."""
    arrays: tuple[tuple[Tool, ArrayConfig | None], ...] = (
        ("build_shards", config.shards),
        ("precompute", config.teacher),
        ("precompute", config.precompute),
    )
    for tool, array in arrays:
        for command in array.commands if array is not None else ():
            check(tool, shlex.split(command))
    samples = config.samples
    if samples is None:
        return
    check("sample", ["--weights", "x", "--tokenizer", "x", "--out", "x", *shlex.split(samples.options)])
    num_classes = load_config(PretrainConfig, config.pretrain.recipe, config.pretrain.overrides).model.num_classes
    if samples.parts > num_classes:
        raise UserError(f"samples.parts: {samples.parts} parts, but only {num_classes} classes to draw; use fewer")


def _check_inputs(config: PipelineConfig, request: Request, profile: Profile) -> None:
    """Raises UserError for a recipe that does not fit, and for missing files that no stage makes."""
    made = [root() / path for array in _array_stages(config) for name, path in _paths(array) if name == "--out"]
    images = {"data.images", "data.heldout_images"} if config.shards else set()
    sets = images | ({"data.tokens", "data.heldout_tokens", "data.features"} if config.precompute else set())
    tokenizer = {"tokenizer"} if config.tokenizer else set()
    if config.tokenizer is not None:
        training = _request(config.tokenizer, "train-tokenizer")
        check_recipe(training, profile, made_before=images)
        made.append(output_dir(training))

    def is_made(path: Path) -> bool:
        return any((root() / path).is_relative_to(place) for place in made)

    others = {key for key, path in recipe_paths(request.recipe, request.overrides) if is_made(path)}
    check_recipe(request, profile, made_before=sets | tokenizer | others)
    for array in _array_stages(config):
        for name, path in _paths(array):
            check_paths(profile, [(name, path)])
            if name != "--out" and not is_made(path):
                check_exists(name, path)
    if config.samples is not None and config.samples.evaluate is not None:
        for name, path in config.samples.evaluate:
            check_paths(profile, [(f"samples.evaluate.{name}", path)])
            check_exists(f"samples.evaluate.{name}", path)
    best = config.samples is not None and config.samples.weights == "best"
    if best and recipe_value("data.heldout_tokens", request.recipe, request.overrides) is None:
        raise UserError(
            "samples.weights: best means the weights of lowest held-out cross-entropy, but the recipe has no "
            "data.heldout_tokens; give it, or set samples.weights: last"
        )


def _array_stages(config: PipelineConfig) -> list[ArrayConfig]:
    return [stage for stage in (config.shards, config.teacher, config.precompute) if stage is not None]


def _paths(array: ArrayConfig) -> Iterator[tuple[str, Path]]:
    """(option, path) of all files and directories that the commands name; image sets have no option."""
    for command in array.commands:
        for _, name, path in path_words(command_words(command)):
            yield name, Path(path)


def _submit_all(stages: list[Stage], profile: Profile, record: Path, dry_run: bool) -> list[str]:
    after: tuple[str, ...] = ()
    numbers: list[str] = []
    with cancelled_on_error(numbers):
        for stage in stages:
            ends = []
            for job, check in stage.jobs:
                job = replace(job, after=after)
                log.say(f"{stage.name}: {shlex.join(sbatch_command(job, profile))}")
                if dry_run:
                    continue
                number = submit(job, profile, record)
                numbers.append(number)
                if check is not None:
                    number = submit(replace(check, after=after, after_any=number), profile, record)
                    numbers.append(number)
                ends.append(number)
                log.say(f"{stage.name}: job {number}")
            after = tuple(ends)
    return numbers


def _request(training: TrainingConfig, job: str) -> Request:
    return Request(recipe=training.recipe, overrides=training.overrides, job=job, nodes=training.nodes)


def _stages(config: PipelineConfig, run: Path) -> Iterator[Stage]:
    """The jobs that are not done yet, stage by stage."""
    record = run / "slurm"
    if config.shards is not None:
        yield Stage("shards", tuple(_arrays("build_shards", "shards", config.shards, record)))
    if config.tokenizer is not None:
        yield Stage("tokenizer", tuple(_training("train-tokenizer", config.tokenizer)))
    if config.teacher is not None:
        yield Stage("teacher", tuple(_arrays("precompute", "teacher", config.teacher, record)))
    if config.precompute is not None:
        yield Stage("precompute", tuple(_arrays("precompute", "precompute", config.precompute, record)))
    yield Stage("pretrain", tuple(_training("pretrain", config.pretrain)))
    if config.samples is not None:
        yield Stage("samples", tuple(_samples(config, run)))


def _digest(*values: object) -> str:
    """Part of a state directory's name: changed work gets another directory, and so is not taken for done."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:8]


def _training(kind: str, training: TrainingConfig) -> Iterator[tuple[Job, Job | None]]:
    request = _request(training, kind)
    if not is_finished(request):
        words = (str(training.recipe.resolve()), *training.overrides)
        state, script = output_dir(request) / "slurm", kind.replace("-", "_")
        yield Job(script, words, state, name=f"mepa-{script}", nodes=training.nodes), None


def _arrays(script: str, name: str, config: ArrayConfig, record: Path) -> Iterator[tuple[Job, Job | None]]:
    for number, command in enumerate(config.commands):
        state = record / f"{name}-{number}-{_digest(command, config.parts)}"
        words = (str(state), str(config.parts), *command_words(command))
        yield from _array(Job(script, words, state, f"mepa-{name}", 1, config.gpus, config.cpus), config.parts)


def _samples(config: PipelineConfig, run: Path) -> Iterator[tuple[Job, Job | None]]:
    samples = config.samples
    assert samples is not None
    tokenizer = str(recipe_value("tokenizer", config.pretrain.recipe, config.pretrain.overrides))
    evaluate = samples.evaluate
    # With a changed recipe they are other samples.
    recipe = load_config(PretrainConfig, config.pretrain.recipe, config.pretrain.overrides)
    what = samples.model_dump_json(exclude={"evaluate"}), recipe.model_dump_json()
    state = run / "slurm" / f"samples-{_digest(*what)}"
    scores = state / f"scores-{_digest(evaluate.model_dump_json())}.json" if evaluate is not None else None
    if (scores or state / "samples.npz").exists():
        return
    words = [str(state), str(samples.parts), str(run / samples.weights), tokenizer, str(samples.per_class)]
    words.append(str(samples.seed))
    words += [str(scores), str(evaluate.reference), str(evaluate.inception)] if evaluate is not None else ["-"] * 3
    job = Job("generate_evaluate", (*words, *shlex.split(samples.options)), state, "mepa-samples", tasks_per_node=1)
    # All parts may be drawn, and yet not packed or scored.
    yield from _array(job, samples.parts, always=True, check_on_gpu=evaluate is not None)


def _array(job: Job, parts: int, always: bool = False, check_on_gpu: bool = False) -> Iterator[tuple[Job, Job | None]]:
    left = open_parts(job.state, parts)
    check = replace(job, name=f"{job.name}-check", tasks_per_node=int(check_on_gpu))
    if left:
        yield replace(job, array=array_of(left)), check
    elif always:
        yield check, None
