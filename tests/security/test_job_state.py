"""slurm/*.sh in a run directory that a stranger made, or that a colleague can write to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mepa_ds.slurm.in_job.cause import read_log
from mepa_ds.slurm.in_job.parts import read_result
from mepa_ds.slurm.jobs import recorded_jobs
from tests.slurm.cluster import ROOT

_FAKES = {
    "scontrol": '[[ $1 == show && $2 == hostnames ]] && echo localhost || echo "   JobState=RUNNING"',
    "squeue": 'echo "squeue $*" >>"$FAKE/calls"',
    "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 exec "$@"',
}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    for name, text in _FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "x.env").write_text("MEPA_PARTITION=gpu\nMEPA_HEALTH=off\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("years of work")
    return tmp_path


def run(work: Path, script: str) -> subprocess.CompletedProcess[str]:
    """A batch script of job 7 that does these lines."""
    (work / "job").write_text(
        f"set -euo pipefail\nMEPA_ROOT={ROOT}\nsource {ROOT}/slurm/lib.sh\nmepa_setup\n{script}\n"
    )
    environment = {
        **os.environ, "PATH": f"{work}/bin:{os.environ['PATH']}", "FAKE": str(work), "MARK": str(work / "PWNED"),
        "MEPA_CLUSTER": str(work / "x.env"), "MEPA_PYTHON": sys.executable, "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n", "SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1", "MEPA_RETRY_SECONDS": "0.1",
    }  # fmt: skip
    return subprocess.run(
        ["bash", work / "job"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


_WORDS = [
    "a/b/;1etouch${IFS}$MARK;# 0",
    "a[$(touch${IFS}$MARK)] 0",
    "$(touch $MARK) `touch $MARK`",
    "--user=me 0",
    "8 a[$(touch${IFS}$MARK)]",
    "\x1b]0;owned\x07\nerror: forged",
]


@pytest.mark.parametrize("words", _WORDS)
def test_words_of_a_run_directory_are_data(work: Path, words: str) -> None:
    """Whatever owner, result, starts and exit codes say, none of it is run, and none is asked of SLURM."""
    state = work / "run/slurm"
    (state / "exit-7").mkdir(parents=True)
    for name in ("owner", "result", "starts-7", "exit-7/0"):
        (state / name).write_text(f"{words}\n")
    end = run(work, f"LOG=/dev/null PROGRESS={work}/x RANKS_PER_NODE=1; open_state {state}\n"
              "take_ownership; bound_restarts; echo \"codes:$(exit_codes).\"; finish 0")  # fmt: skip
    assert not (work / "PWNED").exists(), end.stdout + end.stderr
    assert not (work / "calls").exists() or "--user" not in (work / "calls").read_text()
    assert "codes: ." in end.stdout
    assert "\x1b" not in end.stdout
    assert not any(line.startswith("error: forged") for line in end.stdout.splitlines())


@pytest.mark.parametrize("name", ["result", "owner", "starts-7", "exit-7", ".owner.7", "exit-7/0"])
def test_nothing_is_written_through_a_link(work: Path, name: str) -> None:
    state, thesis = work / "run/slurm", work / "thesis"
    (state / name).parent.mkdir(parents=True)
    (state / name).symlink_to(thesis if name == "exit-7" else thesis / "thesis.tex")
    end = run(work, f"mepa_begin {state} {work}/run/checkpoints; mepa_work true")
    assert end.returncode == 0, end.stdout + end.stderr
    assert (state / "result").read_text() == "done\n"
    assert (thesis / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in thesis.iterdir()] == ["thesis.tex"]


def test_a_state_directory_that_is_a_link_is_refused(work: Path) -> None:
    (work / "run/slurm").symlink_to(work / "thesis")
    for script in (f"mepa_begin {work}/run/slurm x", f"SLURM_ARRAY_TASK_ID=0; mepa_part {work}/run/slurm/a 1 x true"):
        end = run(work, script)
        assert end.returncode == 2
        assert f"error: {work}/run/slurm is a link" in end.stdout
        assert [path.name for path in (work / "thesis").iterdir()] == ["thesis.tex"]


def test_a_device_in_place_of_a_file_is_not_read(work: Path) -> None:
    state = work / "run/slurm"
    state.mkdir()
    for name in ("result", "starts-7"):
        (state / name).symlink_to("/dev/zero")
    os.mkfifo(state / "owner")
    end = run(work, f"mepa_begin {state} x; echo begun")
    assert "begun" in end.stdout, end.stdout + end.stderr
    (state / "jobs.jsonl").symlink_to("/dev/zero")
    (state / "part").mkdir()
    (state / "part/result").symlink_to("/dev/zero")
    assert recorded_jobs(state) == []
    assert read_result(state / "part") == ""
    assert read_log(state / "jobs.jsonl") is None


def test_ports_and_ids_of_a_rendezvous_cannot_be_foretold(work: Path) -> None:
    script = "set_addresses; echo $MASTER_PORT $RENDEZVOUS_ID"
    first, second = (run(work, f"RESTART=0; {script}").stdout.split() for _ in range(2))
    assert first[0] != second[0]
    assert first[1].startswith("mepa-7-0-")
    assert len(first[1]) > 40
    assert first[1] != second[1]


def test_launch_writes_no_exit_status_through_links(work: Path) -> None:
    state = work / "run/slurm"
    state.mkdir()
    (state / "exit-7").symlink_to(work / "thesis")
    (state / "owner").write_text("7 0\n")
    command = [sys.executable, str(ROOT / "slurm/launch.py"), "rank", str(state), "true"]
    subprocess.run(command, env={**os.environ, "RANK": "0", "SLURM_JOB_ID": "7"}, capture_output=True, check=False)
    assert [path.name for path in (work / "thesis").iterdir()] == ["thesis.tex"]
