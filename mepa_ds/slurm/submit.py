"""`mepa slurm submit`: one recipe, or a manifest of many, checked and handed to SLURM."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mepa_ds import log, shipped
from mepa_ds.config.base import Section, load_config
from mepa_ds.config.paths import given_path
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
from mepa_ds.errors import UserError
from mepa_ds.files import write_text
from mepa_ds.safety.places import real_directory
from mepa_ds.slurm import scheduler
from mepa_ds.slurm.checks import (
    check_branch,
    check_data,
    check_exists,
    check_nodes,
    check_partition,
    check_paths,
    check_plan,
    is_cached_elsewhere,
    is_there,
)
from mepa_ds.slurm.in_job.parts import DONE, array_of, read_result
from mepa_ds.slurm.in_job.recipe_value import SET_KEYS, recipe_paths, recipe_value
from mepa_ds.slurm.jobs import Job, recorded_jobs, sbatch_command, submit, test_only
from mepa_ds.slurm.profile import Profile, root
from mepa_ds.slurm.scheduler import is_active, slurm

JOBS: dict[str, type[Section]] = {
    "pretrain": PretrainConfig,
    "train-tokenizer": TokenizerTrainingConfig,
    "scaling-study": PretrainConfig,
}


@dataclass(frozen=True)
class Request:
    """The options of `mepa slurm submit`."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    job: str = "pretrain"
    nodes: int = 1
    gpus: int | None = None
    time: str | None = None
    after: tuple[str, ...] = ()
    limit: int = 8
    copies_sets: bool = False
    dry_run: bool = False


def submit_recipe(request: Request, profile: Profile) -> str | None:
    """Checks everything that can be known now, prints the sbatch line, submits; returns the job's number.

    Raises:
        UserError: something does not fit; nothing was submitted.
    """
    if request.gpus is not None:
        profile = replace(profile, values=profile.values | {"MEPA_GPUS_PER_NODE": str(request.gpus)})
    asks = asks_slurm(profile, request.dry_run)
    check_cluster(profile, request.nodes, asks)
    if request.job == "scaling-study":
        return _submit_study(request, profile, asks)
    run = output_dir(request)
    record = run / "slurm"
    if asks:
        refuse_while_active(record)
    check_recipe(request, profile)
    words = (str(request.recipe.resolve()), *request.overrides)
    job = Job(
        script=request.job.replace("-", "_"),
        arguments=words,
        state=record,
        name=f"mepa-{run.name}",
        nodes=request.nodes,
        time=request.time,
        after=request.after,
        copies_sets=request.copies_sets,
    )
    return hand_over(job, profile, record, request.dry_run, f"mepa slurm status {run}", asks)


def is_finished(request: Request) -> bool:
    """Whether a run is done, and was done by today's recipe and overrides (a recipe with more steps is not done).

    Where the data lie does not count: a start may have read copies on its nodes' disks, and other data are refused.
    """
    run = output_dir(request)
    if read_result(run / "slurm") != DONE or not (run / "resolved.yaml").is_file():
        return False
    kind = JOBS[request.job]
    wanted = load_config(kind, request.recipe, request.overrides).model_dump(mode="json")
    try:  # a key that is newer than the run had its default
        done = load_config(kind, run / "resolved.yaml").model_dump(mode="json")
    except UserError:
        return False
    return _but_places(wanted) == _but_places(done)


def _but_places(recipe: dict[str, Any]) -> dict[str, Any]:
    data = {key: value for key, value in recipe.get("data", {}).items() if f"data.{key}" not in SET_KEYS}
    return recipe | {"data": data}


def asks_slurm(profile: Profile, dry_run: bool) -> bool:
    """Whether SLURM is asked. A dry run where there is no SLURM says what it leaves unchecked."""
    if not dry_run or scheduler.is_here():
        return True
    log.say(
        "no SLURM here (scontrol or sbatch is not found, or knows no cluster). Not checked: whether partition "
        f"{profile.get('PARTITION')} exists and has such nodes, whether a job is at work in the same output_dir, and "
        "whether SLURM would take the job"
    )
    return False


def check_cluster(profile: Profile, nodes: int, asks: bool = True) -> None:
    """Raises UserError unless the partitions exist and have such nodes; `asks`: whether SLURM is asked for that."""
    if nodes < 1:
        raise UserError(f"--nodes {nodes}: expected at least 1")
    if asks:
        partition = profile.get("PARTITION")
        check_partition(profile, partition)
        check_partition(profile, profile.get("CPU_PARTITION", partition))
        check_nodes(profile, partition, nodes)
    scripts = ("this clone", shipped.CLONE) if shipped.CLONE else ("mepa_ds", shipped.folder("slurm"))
    check_paths(profile, [scripts])


def output_dir(request: Request) -> Path:
    return root() / str(recipe_value("output_dir", request.recipe, request.overrides))


def check_recipe(
    request: Request, profile: Profile, made_before: Set[str] = frozenset(), looked_at: set[str] | None = None
) -> None:
    """Validates a recipe, its data, and its plan against the allocation.

    `made_before`: keys of files that earlier jobs of a pipeline make, which need not be there yet. `looked_at`: see
    `check_data`.
    """
    config = load_config(JOBS[request.job], request.recipe, request.overrides)
    world_size = request.nodes * profile.gpus_per_node
    paths = list(recipe_paths(request.recipe, request.overrides))
    check_paths(profile, [("recipe", request.recipe.resolve()), ("output_dir", output_dir(request)), *paths])
    if later := [name for name, path in paths if request.after and not is_there(path)]:
        log.say(f"not there yet, left to job {', '.join(request.after)}: {', '.join(later)}")
        made_before = made_before | set(later)
    for name, path in paths:
        if name not in made_before:
            check_exists(name, path)
    if isinstance(config, (PretrainConfig, TokenizerTrainingConfig)):
        config.check_world(world_size)
    elsewhere = {name for name, path in paths if is_cached_elsewhere(path)}
    check_data(config, made_before | elsewhere, set() if looked_at is None else looked_at)
    if isinstance(config, PretrainConfig):
        read_here = {name for name, _ in paths} - made_before
        if "branch_from" in read_here and (made_before | elsewhere).isdisjoint(("tokenizer", *SET_KEYS)):
            check_branch(config)
        log.say(check_plan(profile, request.recipe.resolve(), config, world_size))


def refuse_while_active(record: Path) -> None:
    """Raises UserError while a job that was submitted for this run waits or runs."""
    for line in recorded_jobs(record):
        if is_active(line["job"]):
            raise UserError(
                f"job {line['job']} ({line['name']}) is already at work in {record.parent}; cancel it first "
                f"(scancel {line['job']}), or choose another output_dir"
            )


def hand_over(job: Job, profile: Profile, record: Path, dry_run: bool, hint: str, asks: bool = True) -> str | None:
    """Asks SLURM whether it would take the job, prints the sbatch line, and submits unless it is a dry run."""
    command = sbatch_command(job, profile)
    if asks:
        test_only(command)
    log.say(shlex.join(command))
    if dry_run:
        return None
    number = submit(job, profile, record)
    log.say(f"job {number} submitted; {hint}")
    return number


def _submit_study(request: Request, profile: Profile, asks: bool) -> str | None:
    """Submits an array with a member for each unfinished line of a manifest, and a job that checks them all."""
    manifest = request.recipe
    if request.overrides:
        raise UserError("a scaling study's overrides stand in its manifest: RECIPE key=value ... on a line")
    lines = manifest_lines(manifest)
    runs: list[Path] = []
    members: list[Request] = []
    looked_at = set[str]()
    for number, (recipe, *overrides) in enumerate(lines, start=1):
        try:
            member = replace(
                request, job="pretrain", recipe=shipped.find(given_path(recipe, "recipe")), overrides=tuple(overrides)
            )
            check_recipe(member, profile, looked_at=looked_at)
            run = output_dir(member).resolve()
            if run in runs:
                raise UserError(f"output_dir: {run} is also used by run {runs.index(run) + 1}; give each its own")
            runs.append(run)
            members.append(member)
        except UserError as error:
            raise UserError(f"{manifest}: run {number}: {error}") from error
    state = manifest.resolve().with_suffix(".slurm")
    if asks:
        refuse_while_active(state)
    # Each run knows whether it is done. The number of a line does not: lines may come and go between two starts.
    left = [part for part, member in enumerate(members) if not is_finished(member)]
    if not left:
        if not request.dry_run:
            _link_parts(state, runs)
        log.say(f"{manifest}: all {len(lines)} runs are done")
        return None
    # Members read their line when they start, and the user's file may have other lines by then.
    copied = state / "manifest.txt"
    words = (str(state), str(len(lines)), str(copied))
    job = Job(
        script="scaling_study",
        arguments=words,
        state=state,
        name=f"mepa-{manifest.stem}",
        nodes=request.nodes,
        time=request.time,
        array=f"{array_of(left)}%{request.limit}",
        after=request.after,
        copies_sets=request.copies_sets,
    )
    check = replace(job, name=f"{job.name}-check", tasks_per_node=0, nodes=1, array=None, after=(), copies_sets=False)
    for planned in (job, check) if asks else ():
        test_only(sbatch_command(planned, profile))
    if not request.dry_run:
        _link_parts(state, runs)
        write_text(copied, manifest.read_text())
    array = hand_over(job, profile, state, request.dry_run, f"{len(left)} of {len(lines)} runs", asks)
    if array is None:
        return None
    with cancelled_on_error([array]):
        return hand_over(replace(check, after_any=array), profile, state, False, f"it says which runs failed: {state}")


@contextmanager
def cancelled_on_error(numbers: Sequence[str]) -> Iterator[None]:
    """Submits jobs that belong together all or none: an error cancels those that were submitted before it."""
    try:
        yield
    except UserError as error:
        if not numbers:
            raise
        slurm(["scancel", *numbers])
        raise UserError(f"{error}; jobs {', '.join(numbers)}, submitted before, were cancelled") from error


def _link_parts(state: Path, runs: Sequence[Path]) -> None:
    """Links `state`/part-<number> to the state of each run. The job after the array looks there."""
    real_directory(state, "MANIFEST")
    for part, run in enumerate(runs):
        link = state / f"part-{part}"
        if link.is_symlink() or not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(run / "slurm")
        else:
            raise UserError(f"{link}: is no link of a study's run; move it away")


def manifest_lines(path: Path) -> list[list[str]]:
    """The words of every line that is not blank and no comment."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot read the manifest: {error.strerror}") from error
    found = [line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise UserError(f"{path}: no runs; a line is RECIPE [key=value ...]")
    return found
