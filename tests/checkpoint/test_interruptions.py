"""Runs that are killed at any moment, and moved to other numbers of ranks, are the uninterrupted run.

The counts here are for every day; MEPA_FULL_TESTS=1 runs all kills and the whole matrix (about 10 minutes).
"""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mepa_ds.checkpoint.compare import differences
from mepa_ds.checkpoint.files import checkpoint_name
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.runtime.stopping import REQUEUE_EXIT_CODE
from mepa_ds.weights.directories import read_state_dict
from tests.gates import Gates, install
from tests.on_request import FULL
from tests.ranks import Ranks, arguments, finish, last_step
from tests.tiny_run import losses, make_run

NUM_KILLS, NUM_SIGNALS = (30, 10) if FULL else (3, 2)
STEPS = 20 + 6 * (NUM_KILLS + NUM_SIGNALS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interruptions")
    make_run(folder, f"train.steps={STEPS}", "log.evaluate_every=7", "log.checkpoint_every=2", "optim.ema=0.9")
    return folder


def test_kills_and_signals_at_any_moment_change_nothing(folder: Path) -> None:
    """kill -9 of all ranks, also while a checkpoint is written, and SIGUSR1: equal losses and weights, bit by bit."""
    finish(arguments(folder, "whole", "parallel.ep_size=2"), 2, folder / "whole.log")
    chance = random.Random(0)
    events = ["kill"] * NUM_KILLS + ["signal"] * NUM_SIGNALS
    chance.shuffle(events)
    output, gates, half_written = folder / "cut", Gates(folder / "gates"), 0
    for number, event in enumerate(events):
        step = 6 * number + chance.randint(5, 8)
        in_a_write = event == "kill" and number % 2 == 0
        place = f"writing_{checkpoint_name(step - step % 2)}" if in_a_write else f"step_{step}"
        gates.close(place)
        words = arguments(folder, "cut", "parallel.ep_size=2")
        with Ranks(words, 2, folder / "cut.log", partial(install, gates.folder)) as ranks:
            gates.wait(place, 2, ranks.check)
            if event == "signal":
                rank = chance.randrange(2)
                ranks.signal(signal.SIGUSR1, rank)
                gates.wait_noted(rank)
                gates.open(place)
                assert ranks.wait() == [REQUEUE_EXIT_CODE] * 2, ranks.log.read_text()
                assert last_step(output) == step + 1, "that step, and the one in which all ranks agree"
            else:
                if not in_a_write:
                    gates.close(f"step_{step + 2}")  # not beyond the next event's place
                    gates.open(place)
                    time.sleep(chance.uniform(0, 0.05))  # any moment will do
                ranks.kill()
                half_written += any((output / "checkpoints").glob(".*.tmp"))
                gates.open(place if in_a_write else f"step_{step + 2}")
    finish(arguments(folder, "cut", "parallel.ep_size=2"), 2, folder / "cut.log")
    print(f"{NUM_KILLS} kills ({half_written} in the middle of a checkpoint), {NUM_SIGNALS} signals, {STEPS} steps")
    expected = sum(event == "kill" and number % 2 == 0 for number, event in enumerate(events))
    assert half_written >= expected > 0, "kills in the middle of a checkpoint"
    assert losses(output) == losses(folder / "whole")
    assert len(losses(output)) == STEPS
    name = f"checkpoints/{checkpoint_name(STEPS)}"
    different = [line.split(":")[0] for line in differences(folder / "whole" / name, output / name)]
    assert set(different) <= {"recipe.output_dir", "metrics_records"}  # each start leaves a record of itself
    for exported in ("last", "last_ema", "best"):
        theirs = read_state_dict(output / exported)
        for key, tensor in read_state_dict(folder / "whole" / exported).items():
            assert tensor.equal(theirs[key]), (exported, key)


def test_a_progressive_run_resumes_where_it_was(folder: Path) -> None:
    """Scales 1-2 for the first half of the steps, then all 3; guidance falls over the first three quarters. Both are
    functions of the step."""
    settings = ["train.progressive=0.5", "objective.alignment.until=0.75", "train.steps=12"]
    settings += ["log.evaluate_every=100", "log.keep_checkpoints=99"]
    finish(arguments(folder, "progressive", *settings), 2, folder / "progressive.log")
    output, checkpoint = folder / "progressive_cut", Path("checkpoints") / checkpoint_name(4)
    shutil.copytree(folder / "progressive" / checkpoint, output / checkpoint)
    finish(arguments(folder, output.name, *settings), 2, folder / "progressive_cut.log")
    assert losses(output) == losses(folder / "progressive")[4:]
    output = folder / "progressive"
    records = [r for r in read_metrics(output / "metrics.jsonl") if r["event"] == "train"]
    assert [record["scales"] for record in records] == [2] * 6 + [3] * 6
    assert [record["alignment"] == 0 for record in records] == [False] * 9 + [True] * 3
    assert [record["ce_last"] == "nan" for record in records] == [True] * 6 + [False] * 6
    plain = next(r["step_flops"] for r in read_metrics(output / "metrics.jsonl") if r["event"] == "start")
    rates = [record["flops_per_second"] * record["step_seconds"] / plain for record in records]
    assert rates[:6] == pytest.approx([rates[0]] * 6)
    assert rates[0] < 0.6
    assert rates[6:] == pytest.approx([1.0] * 6)


TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]
# Every topology is written once and read once.
DAILY = (((1, 1), (4, 4)), ((2, 1), (2, 2)), ((2, 2), (1, 1)), ((4, 2), (2, 1)), ((4, 4), (4, 2)))
PAIRS = [
    pytest.param(*pair, marks=() if pair in DAILY else pytest.mark.slow)
    for pair in itertools.permutations(TOPOLOGIES, 2)
]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resharding")
    moe = ["model.moe.bias_rate=0.01", "optim.ema=0.9"]
    make_run(folder, "train.steps=10", "log.evaluate_every=100", "log.checkpoint_every=5", *moe)
    return folder


@pytest.mark.parametrize(("saved", "resumed"), PAIRS, ids=str)
def test_any_topology_resumes_at_any_other(short: Path, saved: tuple[int, int], resumed: tuple[int, int]) -> None:
    """The next 5 losses are those of the run that stayed, and the state at their end too."""
    source = short / f"whole_{saved}"
    if not source.exists():
        settings = arguments(short, source.name, f"parallel.ep_size={saved[1]}")
        finish(settings, saved[0], short / f"{source.name}.log")
    target = short / f"moved_{saved}_{resumed}"
    checkpoint = Path("checkpoints") / checkpoint_name(5)
    shutil.copytree(source / checkpoint, target / checkpoint)
    settings = arguments(short, target.name, f"parallel.ep_size={resumed[1]}")
    log = finish(settings, resumed[0], short / f"{target.name}.log")
    assert f"resumed from {target / checkpoint} at step 5 of 10" in log
    np.testing.assert_allclose(losses(target), losses(source)[5:], atol=1e-5, rtol=0)
    for exported in ("last", "last_ema"):
        theirs = read_state_dict(target / exported)
        for key, tensor in read_state_dict(source / exported).items():
            np.testing.assert_allclose(theirs[key].numpy(), tensor.numpy(), atol=1e-5, rtol=1e-4, err_msg=key)
