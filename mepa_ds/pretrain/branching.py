"""A branch: a run that starts from a checkpoint of another run, the trunk, and ends with a length of its own.

The steps of several lengths that are the same then are trained once. A branch equals the uninterrupted run of its own
recipe, bit for bit on the same ranks, because whatever would have made an earlier step another one is refused: the
model, the data, the losses, the optimizer, and a learning rate of an earlier step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mepa_ds import distributed
from mepa_ds.checkpoint.files import MANIFEST_NAME, list_checkpoints
from mepa_ds.checkpoint.state import RunState, read_state
from mepa_ds.config.base import Section, validate
from mepa_ds.config.objective import ObjectiveConfig
from mepa_ds.config.optim import PretrainOptimConfig
from mepa_ds.config.pretrain import PretrainConfig, PretrainTrainConfig
from mepa_ds.errors import UserError
from mepa_ds.pretrain.resuming import differences, model_differences
from mepa_ds.runtime.schedule import learning_rate, phase_steps

_KEY = "branch_from"
# Keys of optim that act through the learning rate alone. They may differ, if the rates so far do not.
_RATE_KEYS = ("base_lr", "schedule", "cooldown", "warmup", "warmup_steps", "warmup_start", "final_lr")


@dataclass
class Branch:
    """The checkpoint that a run starts from, and its state as this run takes it over."""

    path: Path
    state: RunState


@dataclass(frozen=True)
class _Rates:
    """What the learning rate of a step depends on."""

    optim: PretrainOptimConfig
    global_batch: int
    num_steps: int

    def until(self, step: int) -> list[float]:
        """The rates of all steps before the 0-based `step`."""
        return [learning_rate(self.optim, self.global_batch, number, self.num_steps) for number in range(step)]


def open_branch(config: PretrainConfig, data: dict[str, str], num_samples: int) -> Branch:
    """Reads `branch_from` and checks that the recipe can go on from it. The tensors are not read. Collective.

    `data` is what this run's samples depend on (`data_identity`), and `num_samples` their number.

    Raises:
        UserError: on every rank, for something that is no checkpoint, and for a checkpoint whose steps this recipe
            would have trained in another way. The message says how to mend it.
    """
    error: UserError | None = None
    branch: Branch | None = None
    try:
        assert config.branch_from is not None
        branch = _opened(config.branch_from, config, data, num_samples)
    except UserError as raised:
        error = UserError(f"{_KEY}: {raised}")
    distributed.agree(error)
    assert branch is not None
    return branch


def trunk_state(path: Path) -> RunState:
    """Reads the state of a checkpoint to branch from. Raises UserError, with a remedy, for anything else."""
    if not (path / MANIFEST_NAME).is_file():
        found = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
        such_as = f"its checkpoints: {', '.join(map(str, found))}" if found else "RUN/checkpoints/step_<number>"
        what = "no checkpoint" if path.exists() else "no such directory"
        raise UserError(f"{path}: {what}; name a checkpoint of a run ({such_as})")
    try:
        return read_state(path)
    except UserError as error:
        raise UserError(f"{error}; name another checkpoint of that run") from error


def _opened(path: Path, config: PretrainConfig, data: dict[str, str], num_samples: int) -> Branch:
    state = trunk_state(path)
    num_steps = config.train.num_steps(num_samples)
    if state.step >= num_steps:
        raise UserError(
            f"{path}: it has {state.step} steps, and this run has {num_steps}: there is nothing left to train; name an "
            "earlier checkpoint, or train longer (train.steps, samples or epochs)"
        )
    if lines := list(_other_training(path, state, config, data)):
        raise UserError(
            f"{path}: its steps were trained in another way than this recipe would have trained them "
            f"({'; '.join(lines)}); set these keys as they are there, or name a checkpoint of a run with this recipe"
        )
    _check_rates(path, state, config, num_samples)
    # Scores, records and the best weights of the trunk stay there: this run has found none so far. That it writes
    # elsewhere is no change of the recipe.
    fresh: dict[str, Any] = {"best_heldout_ce": float("inf"), "evaluated_step": state.step, "heldout": ""}
    fresh["scored_step"] = state.step
    recipe = state.recipe | {"output_dir": str(config.output_dir), "branch_from": str(path)}
    return Branch(path, replace(state, metrics_records=0, recipe=recipe, **fresh))


def _other_training(path: Path, state: RunState, config: PretrainConfig, data: dict[str, str]) -> Iterator[str]:
    """Yields what differs, besides the learning rate, from how this recipe would have trained the steps so far."""
    yield from model_differences(path, state, config.model)
    yield from differences(state.data, data)
    yield from differences(_but_rates(_optim_of(path, state)), _but_rates(config.optim), "optim.")
    objective = validate(ObjectiveConfig, dict(state.recipe["objective"]), str(path))
    yield from differences(_plain(objective), _plain(config.objective), "objective.")
    theirs, ours = _train_of(path, state), config.train
    for key in ("global_batch", "progressive"):  # this recipe cannot have progressive
        if getattr(theirs, key) != getattr(ours, key):
            yield f"train.{key}: {getattr(theirs, key)!r} there, {getattr(ours, key)!r} now"


def _check_rates(path: Path, state: RunState, config: PretrainConfig, num_samples: int) -> None:
    """Raises UserError unless this recipe has the trunk's learning rate, to the bit, in all steps so far."""
    train = _train_of(path, state)
    theirs = _Rates(_optim_of(path, state), train.global_batch, train.num_steps(num_samples))
    ours = _Rates(config.optim, config.train.global_batch, config.train.num_steps(num_samples))
    stable_end = theirs.num_steps - phase_steps(theirs.optim, theirs.num_steps)[1]
    if state.step > stable_end:
        raise UserError(
            f"{path}: step {state.step} lies within the cooldown of its own run, which begins after step {stable_end}; "
            "name a checkpoint of that step or an earlier one (log.keep_steps writes and keeps such checkpoints)"
        )
    there, here = theirs.until(state.step), ours.until(state.step)
    if there == here:
        return
    first = next(step for step, (their, our) in enumerate(zip(there, here, strict=True)) if their != our)
    earlier = f", or name a checkpoint of step {first} or an earlier one" if first else ""
    raise UserError(
        f"{path}: the learning rate of step {first + 1} was {there[first]:.6g} there, and is {here[first]:.6g} in this "
        f"recipe ({'; '.join(_causes(theirs, ours, state.step))}); set that as it is there{earlier}. Runs of other "
        "lengths have the same rates with schedule constant or wsd and the same optim.warmup_steps"
    )


def _causes(theirs: _Rates, ours: _Rates, step: int) -> list[str]:
    """Returns the keys that, changed alone, change a rate before `step`; all that differ, if none does so alone."""
    rates, causes, others = theirs.until(step), list[str](), list[str]()
    for key in (*_RATE_KEYS, "num_steps"):
        if key == "num_steps":
            there, now, name = theirs.num_steps, ours.num_steps, "the number of steps"
            changed = replace(theirs, num_steps=now)
        else:
            there, now, name = getattr(theirs.optim, key), getattr(ours.optim, key), f"optim.{key}"
            changed = replace(theirs, optim=theirs.optim.model_copy(update={key: now}))
        if there != now:
            line = f"{name}: {there!r} there, {now!r} now"
            (causes if changed.until(step) != rates else others).append(line)
    return causes or others


def _optim_of(path: Path, state: RunState) -> PretrainOptimConfig:
    return validate(PretrainOptimConfig, dict(state.recipe["optim"]), str(path))


def _train_of(path: Path, state: RunState) -> PretrainTrainConfig:
    return validate(PretrainTrainConfig, dict(state.recipe["train"]), str(path))


def _but_rates(optim: PretrainOptimConfig) -> dict[str, Any]:
    return {key: value for key, value in _plain(optim).items() if key not in _RATE_KEYS}


def _plain(section: Section) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(section.model_dump_json())
    return values
