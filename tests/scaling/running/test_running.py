"""A study at work: stopped, killed and started again; members that fail and members that diverge."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.runtime.run_lock import is_held
from tests.scaling.study.studies import study_values
from tests.tiny_run import ROOT, make_run

pytestmark = pytest.mark.processes
PATIENCE = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_run(folder)
    return folder


def write_study(data: Path, folder: Path, **changes: Any) -> Path:
    """Four short runs over the sets in `data`."""
    values = study_values(data, output_dir=str(folder / "study"))
    values |= {
        "laws": ["power"],
        "grids": {"dense": {"sizes": ["d1w16", "d1w32"], "samples": [80, 160]}},
        "set": {"data.features": None, "log.every": 5},
    } | changes
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(study: Path, jobs: int = 2) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mepa_ds", "scale", "run", str(study), "--jobs", str(jobs)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
    )


def finish(process: subprocess.Popen[str], status: int) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def steps_of(folder: Path, run: str) -> list[int]:
    records = read_metrics(folder / "study/runs" / run / "metrics.jsonl")
    return [record["step"] for record in records if record["event"] == "train"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_study_goes_on_where_it_was_stopped(data: Path, tmp_path: Path, number: int) -> None:
    """Asked to end, it lets its runs save first; killed, its runs notice and save by themselves. No step is lost."""
    grids = {"dense": {"sizes": ["d1w16", "d1w32"], "samples": [80, 4000]}}
    study = write_study(data, tmp_path, grids=grids)
    long = tmp_path / "study/runs/d1w32-n4000"
    process = start(study)
    wait_for(lambda: bool(steps_of(tmp_path, long.name)))
    process.send_signal(number)
    finish(process, 143 if number == signal.SIGTERM else -9)
    wait_for(lambda: not is_held(long))
    told = (tmp_path / f"study/logs/{long.name}.log").read_text()
    assert "SIGTERM: the step ends, the run is saved and stops" in told
    assert json.loads((long / "status.json").read_text())["state"] == "requeue"
    output = finish(start(study), 0)
    assert "all 4 runs are finished" in output
    assert steps_of(tmp_path, long.name) == list(range(5, 501, 5))
    assert [r["event"] for r in read_metrics(long / "metrics.jsonl")].count("start") == 2


def test_a_run_that_fails_costs_itself_alone(data: Path, tmp_path: Path) -> None:
    """It is named with its last words, and runs again when the study is started again."""
    study = write_study(data, tmp_path)
    bad = tmp_path / "study/runs/d1w16-n80"
    bad.parent.mkdir(parents=True)
    (tmp_path / "study/study.yaml").write_text("name: small\n")
    bad.write_text("in the way")
    output = finish(start(study), 1)
    assert "d1w16-n80: ended with status 2" in output
    assert "d1w16-n80: failed" in output or "d1w16-n80: planned" in output
    assert "3 of 4 runs are finished" in output
    bad.unlink()
    assert "all 4 runs are finished" in finish(start(study), 0)


def test_a_run_that_diverges_ends_early_and_is_marked(data: Path, tmp_path: Path) -> None:
    """ln 16 is 2.77: a limit below it ends every run at its first record; nothing runs them again."""
    study = write_study(data, tmp_path, diverged_above=1.0)
    output = finish(start(study), 1)
    assert output.count("diverged at step 5, not run again") == 4
    again = finish(start(study), 1)
    assert "diverged at step" not in again
    status = [sys.executable, "-m", "mepa_ds", "scale", "status", str(study)]
    told = subprocess.run(status, capture_output=True, text=True, timeout=100, cwd=ROOT, check=True).stdout
    assert told.count("diverged") >= 4
    assert "4 runs: 4 diverged" in told


@pytest.mark.slow
def test_a_mistake_in_all_runs_is_told_after_three(data: Path, tmp_path: Path) -> None:
    study = write_study(data, tmp_path, set={"data.features": None, "tokenizer": str(tmp_path / "nowhere")})
    output = finish(start(study, jobs=1), 2)
    assert "3 runs in a row have failed" in output
    assert str(tmp_path / "nowhere") in output
