"""How many CPUs a process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mepa_ds import machine as cpus
from mepa_ds.data.images import _note_few_cpus, images_once
from mepa_ds.data_tools.build_shards import BuildOptions
from mepa_ds.data_tools.merge_index import Scan
from mepa_ds.data_tools.pool import DEFAULT_WORKERS
from mepa_ds.data_tools.verify_shards import Options as VerifyOptions
from mepa_ds.machine import limit_threads, usable_cpus
from tests.data.shard_fixtures import make_set

VARIABLES = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_STEP_TASKS_PER_NODE", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node of 64 CPUs without control groups; the directory of its control groups."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(cpus, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cpus, "_OWN_CGROUPS", tmp_path / "own")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def set_group(node: Path, own: str, **files: str) -> None:
    (node / "own").write_text(own)
    for name, content in files.items():
        path = node / "cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_affinity_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cpus() == 64
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert usable_cpus() == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    assert usable_cpus() == 64


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_CPUS_PER_TASK": "4"}, 4),
        ({"SLURM_CPUS_ON_NODE": "12"}, 12),
        ({"SLURM_CPUS_ON_NODE": "12", "SLURM_CPUS_PER_TASK": "3"}, 3),
        ({"SLURM_CPUS_ON_NODE": "12", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, 3),
        ({"SLURM_CPUS_PER_TASK": "128"}, 64),
        ({"SLURM_CPUS_PER_TASK": "0", "SLURM_CPUS_ON_NODE": ""}, 64),
        ({"SLURM_CPUS_PER_TASK": "many"}, 64),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"LOCAL_WORLD_SIZE": "100"}, 1),
        # srun starts torchrun, or the ranks themselves (slurm/launch.py)
        ({"SLURM_CPUS_PER_TASK": "48", "SLURM_STEP_TASKS_PER_NODE": "1", "LOCAL_WORLD_SIZE": "4"}, 12),
        ({"SLURM_CPUS_PER_TASK": "12", "SLURM_STEP_TASKS_PER_NODE": "4", "LOCAL_WORLD_SIZE": "4"}, 12),
    ],
)
def test_slurm_and_torchrun_decide(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: int) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert usable_cpus() == expected


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/b\n", {"a__b__cpu_dot_max": "150000 100000\n", "a__cpu_dot_max": "max 100000\n"}, 2),
        ("0::/a/b\n", {"a__b__cpu_dot_max": "max 100000\n", "a__cpu_dot_max": "300000 100000\n"}, 3),
        ("0::/of/the/host\n", {"cpu_dot_max": "20000 100000\n"}, 1),
        ("0::/\n", {"cpu_dot_max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu_dot_max": ""}, 64),
        (
            "3:cpuset:/\n2:cpu,cpuacct:/j\n0::/\n",
            {"cpu__j__cpu_dot_cfs_quota_us": "250000\n", "cpu__j__cpu_dot_cfs_period_us": "100000\n"},
            3,
        ),
        ("2:cpu:/\n", {"cpu__cpu_dot_cfs_quota_us": "-1\n", "cpu__cpu_dot_cfs_period_us": "100000\n"}, 64),
        ("garbage\n\n", {}, 64),
    ],
)
def test_quotas_decide(node: Path, own: str, files: dict[str, str], expected: int) -> None:
    set_group(node, own, **files)
    assert usable_cpus() == expected


def test_tools_start_as_many_processes_as_the_job_may_use() -> None:
    assert BuildOptions.workers == Scan.workers == VerifyOptions.workers == DEFAULT_WORKERS
    code = (
        "import os; os.sched_getaffinity = lambda _: range(64)\n"
        "from mepa_ds.data_tools.pool import DEFAULT_WORKERS\n"
        "from mepa_ds.data_tools.precompute_sets import RunOptions\n"
        "from mepa_ds.machine import usable_cpus\n"
        "print(DEFAULT_WORKERS, RunOptions.workers, usable_cpus())"
    )
    environment = os.environ | {"SLURM_CPUS_PER_TASK": "5"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    processes, threads, cpus_of_task = map(int, done.stdout.split())
    assert threads == cpus_of_task <= 5  # a quota may be lower
    assert processes == max(cpus_of_task - 1, 1)


@pytest.mark.parametrize(
    ("variables", "threads", "said"),
    [
        ({}, 8, None),
        ({"SLURM_CPUS_PER_TASK": "3"}, 8, 3),
        ({"SLURM_CPUS_PER_TASK": "12"}, 8, 8),  # cores are half of what SLURM counts
        ({"SLURM_CPUS_PER_TASK": "3", "OMP_NUM_THREADS": "8"}, 8, None),
    ],
)
def test_threads_are_lowered_only(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], threads: int, said: int | None
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")  # put back after the test, whatever was set
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    limit_threads()
    assert asked == ([said] if said else [])
    assert os.environ.get("OMP_NUM_THREADS") == variables.get("OMP_NUM_THREADS", variables.get("SLURM_CPUS_PER_TASK"))


def test_more_decoding_processes_than_cpus_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    _note_few_cpus.cache_clear()
    make_set(tmp_path, "images", [4])
    for _ in range(2):
        assert len(list(images_once(tmp_path, batch_size=2, image_side=8, num_workers=2))) == 2
    said = capfd.readouterr().err
    assert said == "warning: data.num_workers: 2 processes of a rank share 1 CPUs; 1 would do as well\n"
