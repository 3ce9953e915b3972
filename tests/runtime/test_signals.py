"""A run that is asked to stop saves itself, says so by its exit status, and goes on exactly."""

from __future__ import annotations

import json
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from mepa_ds import distributed
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.runtime.stopping import REQUEUE_EXIT_CODE, deadline
from tests.gates import Gates, install, stop_at
from tests.ranks import Ranks, finish, last_step
from tests.tiny_run import losses, make_run

STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    make_run(folder, f"train.steps={STEPS}", "log.checkpoint_every=1000", "log.evaluate_every=1000")
    return folder


def start(folder: Path, name: str, *overrides: str) -> Ranks:
    """With gates in `<folder>/<name>.gates`."""
    arguments = [str(folder / "recipe.yaml"), f"output_dir={folder / name}", *overrides]
    return Ranks(arguments, 2, folder / f"{name}.log", partial(install, folder / f"{name}.gates"))


def test_a_signal_on_any_rank_saves_and_asks_to_be_started_again(folder: Path) -> None:
    finish([str(folder / "recipe.yaml"), f"output_dir={folder / 'whole'}"], 2, folder / "whole.log")
    output = folder / "stopped"
    stopped_at = []
    gates = Gates(folder / "stopped.gates", "step_6", "step_13")
    for rank, number, place in ((1, signal.SIGUSR1, "step_6"), (0, signal.SIGINT, "step_13")):
        with start(folder, "stopped") as ranks:
            gates.wait(place, 2, ranks.check)
            ranks.signal(number, rank)
            gates.wait_noted(rank)
            gates.open(place)
            assert ranks.wait() == [REQUEUE_EXIT_CODE] * 2, ranks.log.read_text()
        status = json.loads((output / "status.json").read_text())
        assert status["state"] == "requeue"
        assert status["step"] == last_step(output)
        assert status["reason"] in (number.name, "another rank")
        stopped_at.append(status["step"])
    assert stopped_at == [7, 14], "each ends the step that was under way, and the one in which all ranks agree"
    log = finish([str(folder / "recipe.yaml"), f"output_dir={output}"], 2, folder / "stopped.log")
    assert f"stopped at step {stopped_at[1]} of {STEPS} (SIGINT); start again to go on:\n" in log
    assert log.count("SIGINT: the step ends, the run is saved and stops; a second signal ends it at once\n") == 1
    assert "Traceback" not in log
    assert f"at step {stopped_at[0]} of {STEPS}" in log
    assert losses(output) == losses(folder / "whole")
    assert json.loads((output / "status.json").read_text())["state"] == "finished"


def wait_to_meet(folder: Path) -> None:
    """Runs in each rank's process before the run: rank 0 stands at a gate, rank 1 tells when it begins to meet it."""
    if distributed.read_launch().is_main:
        stop_at(folder, "meeting")
        return
    original = distributed.start

    def start(launch: distributed.Launch) -> torch.device:
        (folder / "begins").touch()
        return original(launch)

    distributed.start = start  # type: ignore[assignment]


def test_a_signal_while_ranks_are_still_meeting(folder: Path) -> None:
    output, gates = folder / "meeting", Gates(folder / "meeting.gates", "meeting")
    arguments = [str(folder / "recipe.yaml"), f"output_dir={output}"]
    with Ranks(arguments, 2, folder / "meeting.log", partial(wait_to_meet, gates.folder)) as ranks:
        gates.wait("meeting", 1, ranks.check)
        while not (gates.folder / "begins").exists():
            ranks.check()
            time.sleep(0.01)
        time.sleep(0.5)  # rank 1 tries to reach rank 0 by now; if it is slower, it has its signal before
        ranks.signal(signal.SIGUSR1, 1)
        time.sleep(0.2)
        gates.open("meeting")
        assert ranks.wait() == [REQUEUE_EXIT_CODE] * 2, ranks.log.read_text()
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["step"]) == ("requeue", last_step(output))
    assert "Interrupted system call" not in ranks.log.read_text()


def test_a_second_signal_exits_at_once(folder: Path) -> None:
    """Rank 1 hangs (it is stopped at a gate), so rank 0 waits in a collective and cannot end its step.

    Signals less than a second apart are one request, which launchers deliver twice: many of them are sent here.
    """
    gates = Gates(folder / "hung.gates", "step_4")
    with start(folder, "hung", "train.steps=100000") as ranks:
        gates.wait("step_4", 2, ranks.check)
        ranks.signal(signal.SIGSTOP, 1)
        gates.open("step_4")
        first = time.monotonic()
        while ranks.processes[0].is_alive():
            ranks.signal(signal.SIGUSR1, 0)
            ranks.processes[0].join(0.2)
            assert time.monotonic() < first + 100
        assert time.monotonic() > first + 1
        assert ranks.processes[0].exitcode == 128 + signal.SIGUSR1


def test_a_time_limit_stops_like_a_signal(folder: Path) -> None:
    with start(folder, "limited", "train.steps=100000", "guards.time_limit=0.04", "log.every=50") as ranks:
        assert ranks.wait() == [REQUEUE_EXIT_CODE] * 2, ranks.log.read_text()
    assert "guards.time_limit of 0.04 minutes" in ranks.log.read_text()


@pytest.mark.parametrize("steps", [10, 5], ids=["in the middle", "at the end"])
def test_a_stop_does_not_wait_for_an_evaluation(folder: Path, steps: int) -> None:
    """5 batches a rank: given up after the one under way, and evaluated by the next start."""
    name = f"evaluating{steps}"
    settings = ["log.evaluate_every=5", "log.evaluate_batch=1", f"train.steps={steps}"]
    gates = Gates(folder / f"{name}.gates", "evaluating_5")
    with start(folder, name, *settings) as ranks:
        gates.wait("evaluating_5", 2, ranks.check)
        ranks.signal(signal.SIGUSR1, 1)
        gates.wait_noted(1)
        gates.open("evaluating_5")
        assert ranks.wait() == [REQUEUE_EXIT_CODE] * 2, ranks.log.read_text()
    records = list(read_metrics(folder / name / "metrics.jsonl"))
    assert not [record for record in records if record["event"] == "heldout"]
    assert last_step(folder / name) == 5
    finish([str(folder / "recipe.yaml"), f"output_dir={folder / name}", *settings], 2, folder / f"{name}.log")
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
