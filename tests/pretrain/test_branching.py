"""Branches: runs that start from a checkpoint of another run and equal the uninterrupted run of their own recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mepa_ds.checkpoint.files import MANIFEST_NAME, checkpoint_name, list_checkpoints
from mepa_ds.checkpoint.state import RUN_NAME, read_state
from mepa_ds.checkpoint.store import read_tensors, stored_tensors
from mepa_ds.config.base import load_config
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.training import TrainingBatch
from mepa_ds.errors import UserError
from mepa_ds.objective.objective import ModelInputs
from mepa_ds.planning.plan import Machine, format_plan, plan_run
from mepa_ds.pretrain.branching import open_branch
from mepa_ds.pretrain.inputs import InputMaker
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.weights.directories import read_state_dict
from tests.ranks import Ranks, arguments, finish, refused
from tests.tiny_run import losses, make_run

# Everything that a checkpoint has: an average, a balance bias, sums between two records.
SETTINGS = [
    "optim.schedule=wsd", "optim.warmup_steps=3", "optim.ema=0.5", "model.moe.bias_rate=0.02",
    "log.every=3", "log.evaluate_every=5", "log.checkpoint_every=100", "log.keep_steps=[8]", "log.keep_checkpoints=1",
]  # fmt: skip
STEP = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk of 20 steps (the cooldown begins after step 16) and the run of 10 steps whose cooldown begins after 8."""
    folder = tmp_path_factory.mktemp("branching")
    make_run(folder, *SETTINGS)
    finish(arguments(folder, "trunk", "train.steps=20"), 2, folder / "trunk.log")
    finish(arguments(folder, "full", "train.steps=10"), 2, folder / "full.log")
    return folder


def trunk(folder: Path, step: int = STEP) -> Path:
    return folder / "trunk/checkpoints" / checkpoint_name(step)


def branch_arguments(folder: Path, name: str, *overrides: str) -> list[str]:
    return arguments(folder, name, "train.steps=10", f"branch_from={trunk(folder)}", *overrides)


def trained(folder: Path, name: str, after: int = 0) -> list[dict[str, Any]]:
    """What a run recorded of its training, without times."""
    keys = ("step", "loss", "ce", "ce_scale", "balance", "grad_norm", "steps", "lr", "step_loss")
    records = [r for r in read_metrics(folder / name / "metrics.jsonl") if r["event"] == "train" and r["step"] > after]
    return [{key: record[key] for key in keys} for record in records]


def test_keep_steps_writes_and_keeps_exactly_these(folder: Path) -> None:
    kept = [path.name for path in list_checkpoints(folder / "trunk/checkpoints")]
    assert kept == [checkpoint_name(8), checkpoint_name(20)]


def test_a_branch_is_the_uninterrupted_run_of_its_recipe(folder: Path) -> None:
    log = finish(branch_arguments(folder, "branch"), 2, folder / "branch.log")
    assert f"branched from {trunk(folder)} at step 8 of 10" in log
    start = next(iter(read_metrics(folder / "branch/metrics.jsonl")))
    assert (start["event"], start["step"], start["branch_from"]) == ("start", 8, str(trunk(folder)))
    assert trained(folder, "branch") == trained(folder, "full", after=8) != []
    assert trained(folder, "trunk")[1] == trained(folder, "full")[1]  # of step 6
    ours, theirs = (folder / name / "checkpoints" / checkpoint_name(10) for name in ("branch", "full"))
    names = list(stored_tensors(ours))
    assert set(names) == set(stored_tensors(theirs))
    found, expected = read_tensors(ours, names), read_tensors(theirs, names)
    assert {name.partition("/")[0] for name in names} == {"master", "exp_avg", "exp_avg_sq", "ema", "buffer"}
    assert all(torch.equal(found[name], expected[name]) for name in names)
    for weights in ("last", "last_ema"):
        one, other = read_state_dict(folder / "branch" / weights), read_state_dict(folder / "full" / weights)
        assert all(torch.equal(one[name], other[name]) for name in other)
    states = [read_state(path) for path in (ours, theirs)]
    for key in ("step", "position", "adam_step", "loss_scaler", "data", "window", "skipped_steps"):
        assert getattr(states[0], key) == getattr(states[1], key), key
    changes = [r["changes"] for r in read_metrics(folder / "branch/metrics.jsonl") if r["event"] == "recipe_changed"]
    assert changes == [{"train.steps": [20, 10]}]


def test_a_branch_runs_on_other_ranks_and_its_own_checkpoints_win(folder: Path) -> None:
    """First to step 9, on one rank; then on two, with the experts spread over them, without the trunk."""
    shutil.copytree(trunk(folder), folder / "moved" / "any_name")
    settings = ["log.checkpoint_every=9", f"branch_from={folder}/moved/any_name"]
    finish(arguments(folder, "elastic", "train.steps=9", "optim.cooldown=0.1", *settings), 1, folder / "elastic.log")
    shutil.rmtree(folder / "moved")
    settings += ["train.steps=10", "parallel.ep_size=2", "log.every=1"]
    log = finish(arguments(folder, "elastic", *settings), 2, folder / "elastic2.log")
    assert "resumed from" in log
    records = [record for record in read_metrics(folder / "elastic/metrics.jsonl") if record["event"] == "start"]
    assert [record.get("branch_from") for record in records] == [f"{folder}/moved/any_name", None]
    assert losses(folder / "elastic")[-1] == pytest.approx(trained(folder, "full")[-1]["step_loss"], rel=0.05)


_broken: list[None] = []


def break_first_batch() -> None:
    training = InputMaker.training

    def broken(self: InputMaker, batch: TrainingBatch, scales: int | None) -> ModelInputs:
        inputs = training(self, batch, scales)
        if not _broken:
            _broken.append(None)
            inputs.inputs_BLZ.fill_(float("nan"))
        return inputs

    InputMaker.training = broken  # type: ignore[method-assign,assignment]


def test_a_rollback_before_the_first_checkpoint_goes_back_to_the_branching_point(folder: Path) -> None:
    words = branch_arguments(folder, "rolled", "guards.max_bad_steps=1")
    with Ranks(words, 2, folder / "rolled.log", break_first_batch) as ranks:
        assert ranks.wait() == [0, 0], (folder / "rolled.log").read_text()
    records = list(read_metrics(folder / "rolled/metrics.jsonl"))
    assert [record["event"] for record in records[:3]] == ["start", "recipe_changed", "skipped_step"]
    (rollback,) = (record for record in records if record["event"] == "rollback")
    assert (rollback["step"], rollback["from_step"], rollback["position"]) == (8, 9, 72)
    assert read_state(folder / "rolled/checkpoints" / checkpoint_name(10)).position == 11 * 8


def opened(folder: Path, *overrides: str, data: dict[str, str] | None = None) -> str:
    """What is said of a branch of 10 steps with these overrides; nothing if it is taken."""
    overrides = ("train.steps=10", f"branch_from={trunk(folder)}", *overrides)
    config = load_config(PretrainConfig, folder / "recipe.yaml", overrides)
    try:
        open_branch(config, data or read_state(trunk(folder)).data, num_samples=40)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=8", "it has 8 steps, and this run has 8: there is nothing left to train"),
        ("model.width=64", "model.width: 32 there, 64 now"),
        ("train.global_batch=16", "train.global_batch: 8 there, 16 now"),
        ("objective.balance_weight=0.5", "objective.balance_weight: 0.01 there, 0.5 now"),
        ("optim.weight_decay=0.5", "optim.weight_decay: 0.05 there, 0.5 now"),
        ("optim.ema=null", "optim.ema: 0.5 there, None now"),
        (
            "optim.base_lr=0.04",
            r"the learning rate of step 1 was 3.125e-06 there, and is 6.25e-06 in this recipe (optim.base_lr: 0.02 "
            "there, 0.04 now)",
        ),
        (
            "optim.warmup_steps=4",
            "(optim.warmup_steps: 3 there, 4 now); set that as it is there, or name a checkpoint of",
        ),
        ("optim.warmup_steps=null", "(optim.warmup_steps: 3 there, None now)"),
        ("optim.cooldown=0.4", "step 7 was 0.000625 there"),
        ("optim.schedule=lin0", "(optim.schedule: 'wsd' there, 'lin0' now); set that as it is there, or name"),
        (
            "branch_from=/nowhere",
            "/nowhere: no such directory; name a checkpoint of a run (RUN/checkpoints/step_<number>)",
        ),
    ],
)
def test_what_would_have_trained_the_earlier_steps_in_another_way_is_refused(
    folder: Path, override: str, message: str
) -> None:
    said = opened(folder, override)
    assert said.startswith("branch_from: ")
    assert message in said


def test_what_only_changes_later_steps_is_taken(folder: Path) -> None:
    for override in (
        "optim.final_lr=0",
        "train.steps=16",
        "optim.schedule=constant",
        "log.every=1",
        "optim.warmup=0.5",
    ):
        assert opened(folder, override) == "", override
    assert opened(folder, "train.steps=null", "train.epochs=2") == ""


def test_other_data_and_another_seed_are_refused(folder: Path) -> None:
    data = read_state(trunk(folder)).data
    assert "(seed: '0' there, '1' now)" in opened(folder, data=data | {"seed": "1"})
    assert "data.tokens" in opened(folder, data=data | {"data.tokens": "other"})


def test_a_trunk_with_progressive_training_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "progressive"
    shutil.copytree(trunk(folder), copy)
    values = json.loads((copy / RUN_NAME).read_text())
    values["recipe"]["train"]["progressive"] = 0.5
    (copy / RUN_NAME).write_text(json.dumps(values))
    assert "(train.progressive: 0.5 there, None now)" in opened(folder, f"branch_from={copy}")


def test_a_checkpoint_within_the_cooldown_is_refused(folder: Path) -> None:
    said = opened(folder, f"branch_from={trunk(folder, 20)}", "train.steps=40")
    assert "step 20 lies within the cooldown of its own run, which begins after step 16; name a checkpoint of" in said


def test_a_run_is_no_checkpoint_but_its_checkpoints_are_named(folder: Path) -> None:
    said = opened(folder, f"branch_from={folder}/trunk")
    assert f"{folder}/trunk: no checkpoint; name a checkpoint of a run (its checkpoints: {trunk(folder)}, " in said


def test_schedules_that_depend_on_the_length_have_no_branches(folder: Path, tmp_path: Path) -> None:
    """The recipes differ in their length alone."""
    copy = tmp_path / "lin0"
    shutil.copytree(trunk(folder), copy)
    values = json.loads((copy / RUN_NAME).read_text())
    values["recipe"]["optim"] |= {"schedule": "lin0", "warmup_steps": None}
    (copy / RUN_NAME).write_text(json.dumps(values))
    said = opened(folder, f"branch_from={copy}", "optim.schedule=lin0", "optim.warmup_steps=null")
    assert "(the number of steps: 20 there, 10 now)" in said
    values["recipe"]["optim"] = {key: values["recipe"]["optim"][key] for key in ("base_lr", "ema")}  # of an old version
    (copy / RUN_NAME).write_text(json.dumps(values))
    assert "the number of steps" in opened(
        folder, f"branch_from={copy}", "optim.schedule=lin0", "optim.warmup_steps=null"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("init_weights=x", "branch_from and init_weights both say where the weights come from; give one of them"),
        ("train.progressive=0.5", "branch_from does not go with train.progressive"),
    ],
)
def test_keys_that_exclude_each_other(folder: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(folder, override)


def test_the_plan_says_what_is_left_to_do(folder: Path) -> None:
    machine = Machine(2, is_gpu=False, memory=None, process=0)
    for path, words in (
        (
            trunk(folder),
            "10 steps of 8 images, 80 in all, 2.00 epochs of 40; 2 steps to do, after the 8 of branch_from",
        ),
        (folder / "later", "less the steps of branch_from, which is not there yet"),
    ):
        overrides = ["train.steps=10", f"branch_from={path}"]
        config = load_config(PretrainConfig, folder / "recipe.yaml", overrides)
        assert words in format_plan(plan_run(config, machine))
    with pytest.raises(UserError, match=r"branch_from: .*: no checkpoint; name"):
        plan_run(load_config(PretrainConfig, folder / "recipe.yaml", [f"branch_from={folder}"]), machine)


def test_every_rank_refuses_before_training(folder: Path) -> None:
    """A recipe that does not fit, a damaged file, and a directory that is no checkpoint; nothing of the trunk moves."""
    broken = folder / "broken" / checkpoint_name(STEP)
    shutil.copytree(trunk(folder), broken)
    name = next(name for name in json.loads((broken / MANIFEST_NAME).read_text())["files"] if name.endswith(".distcp"))
    content = bytearray((broken / name).read_bytes())
    content[len(content) // 2] ^= 1
    (broken / name).write_bytes(content)
    for name, override, message in (
        ("r1", "model.depth=3", "model.depth: 2 there, 3 now"),
        ("r2", f"branch_from={broken}", f"{broken} is damaged ("),
        ("r3", f"branch_from={folder}", f"{folder}: no checkpoint; name a checkpoint of a run"),
    ):
        words = [f"branch_from={trunk(folder)}", "train.steps=10", override]
        said = refused(folder, name, *words, ranks=2)
        assert f"{message}" in said
        assert "branch_from: " in said
        assert said.count("error: ") == 1
        assert not (folder / name).exists()
    assert broken.exists()
