"""A run that is asked to stop saves itself, says so by its exit status, and goes on exactly."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mepa_ds import distributed
from mepa_ds.loops.inputs import InputMaker
from mepa_ds.loops.stopping import REQUEUE_EXIT_CODE, deadline
from mepa_ds.metrics import read_metrics
from mepa_ds.objective.pretraining import ModelInputs
from tests.tiny_run import losses, make_run
from tests.training.ranks import Ranks, finish, last_step, wait_for_step

STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    make_run(folder, f"train.steps={STEPS}", "log.checkpoint_every=1000", "log.evaluate_every=1000")
    return folder


def start(folder: Path, name: str, *overrides: str) -> Ranks:
    return Ranks([str(folder / "recipe.yaml"), f"output_dir={folder / name}", *overrides], 2, folder / f"{name}.log")


def test_a_signal_on_any_rank_saves_and_asks_to_be_started_again(folder: Path) -> None:
    finish([str(folder / "recipe.yaml"), f"output_dir={folder / 'whole'}"], 2, folder / "whole.log")
    output = folder / "stopped"
    stopped_at = []
    for rank, number in ((1, signal.SIGUSR1), (0, signal.SIGINT)):
        with start(folder, "stopped") as ranks:
            wait_for_step(ranks, output, last_step(output) + 5)
            ranks.signal(number, rank)
            assert ranks.wait() == [REQUEUE_EXIT_CODE] * 2, ranks.log.read_text()
        status = json.loads((output / "status.json").read_text())
        assert status["state"] == "requeue"
        assert status["step"] == last_step(output) < STEPS
        assert status["reason"] in (number.name, "another rank")
        stopped_at.append(status["step"])
    log = finish([str(folder / "recipe.yaml"), f"output_dir={output}"], 2, folder / "stopped.log")
    assert f"stopped at step {stopped_at[1]} of {STEPS} (SIGINT); start again to go on:\n" in log
    assert log.count("SIGINT: the step ends, the run is saved and stops; a second one ends it at once\n") == 1
    assert "Traceback" not in log
    assert f"at step {stopped_at[0]} of {STEPS}" in log
    assert losses(output) == losses(folder / "whole")
    assert json.loads((output / "status.json").read_text())["state"] == "finished"


def rank_0_is_late() -> None:
    """Runs in each rank's process before the run: rank 1 waits for rank 0, which has not come to its first line."""
    if distributed.read_launch().is_main:
        time.sleep(4)


def test_a_signal_while_ranks_are_still_meeting(folder: Path) -> None:
    output = folder / "meeting"
    arguments = [str(folder / "recipe.yaml"), f"output_dir={output}"]
    with Ranks(arguments, 2, folder / "meeting.log", rank_0_is_late) as ranks:
        time.sleep(2)
        ranks.signal(signal.SIGUSR1, 1)
        assert ranks.wait() == [REQUEUE_EXIT_CODE] * 2, ranks.log.read_text()
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["step"]) == ("requeue", last_step(output))
    assert "Interrupted system call" not in ranks.log.read_text()


def test_a_second_signal_exits_at_once(folder: Path) -> None:
    """Rank 1 hangs (it is stopped), so rank 0 waits in a collective and cannot end its step."""
    with start(folder, "hung", "train.steps=100000") as ranks:
        wait_for_step(ranks, folder / "hung", 3)
        ranks.signal(signal.SIGSTOP, 1)
        ranks.signal(signal.SIGUSR1, 0)
        time.sleep(1.5)
        assert ranks.running
        ranks.signal(signal.SIGUSR1, 0)
        ranks.processes[0].join(5)
        assert ranks.processes[0].exitcode == 128 + signal.SIGUSR1


def test_a_time_limit_stops_like_a_signal(folder: Path) -> None:
    with start(folder, "limited", "train.steps=100000", "guards.time_limit=0.04", "log.every=50") as ranks:
        assert ranks.wait() == [REQUEUE_EXIT_CODE] * 2, ranks.log.read_text()
    assert "guards.time_limit of 0.04 minutes" in ranks.log.read_text()


def wait_long_in_evaluation() -> None:
    """Runs in each rank's process before the run: a batch of an evaluation takes a while."""
    original = InputMaker.evaluation

    def evaluation(maker: InputMaker, *arguments: Any) -> ModelInputs:
        time.sleep(0.4)
        return original(maker, *arguments)

    InputMaker.evaluation = evaluation  # type: ignore[method-assign]


@pytest.mark.parametrize("steps", [10, 5], ids=["in the middle", "at the end"])
def test_a_stop_does_not_wait_for_an_evaluation(folder: Path, steps: int) -> None:
    """5 batches a rank of 0.4 s: given up after the one under way, and evaluated by the next start."""
    name = f"evaluating{steps}"
    settings = ["log.evaluate_every=5", "log.evaluate_batch=1", f"train.steps={steps}"]
    arguments = [str(folder / "recipe.yaml"), f"output_dir={folder / name}", *settings]
    with Ranks(arguments, 2, folder / f"{name}.log", wait_long_in_evaluation) as ranks:
        wait_for_step(ranks, folder / name, 5)
        time.sleep(0.2)
        ranks.signal(signal.SIGUSR1, 1)
        assert ranks.wait() == [REQUEUE_EXIT_CODE] * 2, ranks.log.read_text()
    records = list(read_metrics(folder / name / "metrics.jsonl"))
    assert not [record for record in records if record["event"] == "heldout"]
    assert last_step(folder / name) == 5
    finish(arguments, 2, folder / f"{name}.log")
    records = list(read_metrics(folder / name / "metrics.jsonl"))
    assert [record["step"] for record in records if record["event"] == "heldout"] == list(range(5, steps + 1, 5))
    assert json.loads((folder / name / "status.json").read_text())["state"] == "finished"


def test_a_shortened_run_is_finished(folder: Path) -> None:
    arguments = [str(folder / "recipe.yaml"), f"output_dir={folder / 'shortened'}"]
    for steps in (6, 3):
        finish([*arguments, f"train.steps={steps}"], 2, folder / "shortened.log")
    assert "done: 6 steps" in (folder / "shortened.log").read_text()


def test_the_earlier_limit_counts() -> None:
    now = time.time()
    assert deadline(None, None, {}) is None
    assert deadline(None, 5, {}) is None
    in_an_hour = {"SLURM_JOB_END_TIME": str(int(now + 3600))}
    for limit, expected in ((None, 3300), (10, 600), (120, 3300)):
        found = deadline(limit, 5, in_an_hour)
        assert found is not None
        assert found[0] - now == pytest.approx(expected, abs=2)
