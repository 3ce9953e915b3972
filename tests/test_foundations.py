"""Random streams, schedules, scales, metrics, atomic files."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mepa_ds.config.pretrain import TrainConfig
from mepa_ds.distributed import read_launch
from mepa_ds.errors import UserError
from mepa_ds.files import atomic_path, write_text
from mepa_ds.random_streams import uniforms
from mepa_ds.runtime.metrics import MetricsWriter, read_metrics
from mepa_ds.scales import ScaleSchedule
from tests.tiny_run import ROOT


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.integers(1, 8), st.integers(0, 5))
def test_uniforms_depend_on_the_item_alone(items: list[int], count: int, seed: int) -> None:
    together = uniforms(seed, "test", np.array(items), count)
    alone = np.concatenate([uniforms(seed, "test", np.array([item]), count) for item in items])
    np.testing.assert_array_equal(together, alone)
    assert ((together >= 0) & (together < 1)).all()


def test_uniforms_are_uniform_and_independent() -> None:
    drawn = uniforms(0, "a", np.arange(200_000), 2)
    counts, _ = np.histogram(drawn, bins=20, range=(0, 1))
    assert abs(counts / counts.mean() - 1).max() < 0.03
    correlations = [
        np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1],
        np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1],
        np.corrcoef(drawn[:, 0], uniforms(1, "a", np.arange(200_000), 2)[:, 0])[0, 1],
        np.corrcoef(drawn[:, 0], uniforms(0, "b", np.arange(200_000), 2)[:, 0])[0, 1],
    ]
    assert max(map(abs, correlations)) < 0.01


def test_run_length_in_epochs_rounds_up() -> None:
    assert TrainConfig(global_batch=100, epochs=3).num_steps(250) == 8
    assert TrainConfig(global_batch=100, steps=5).num_steps(250) == 5


def test_scale_schedule() -> None:
    schedule = ScaleSchedule.of((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert schedule.num_tokens == 680
    assert schedule.bounds[1] == (1, 5)
    assert schedule.scale_index_L().bincount().tolist() == list(schedule.lengths)
    for sides in ((), (2, 1), (1, 1), (0, 1)):
        with pytest.raises(UserError, match="scales"):
            ScaleSchedule.of(sides)


def test_metrics_of_a_resumed_run_hold_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in range(1, 6):
        writer.write({"event": "train", "step": step, "loss": float("nan") if step == 2 else step / 2})
    writer.close()
    path.write_text(path.read_text() + '{"event": "train", "st')  # killed in the middle of a write
    resumed = MetricsWriter(path, resume_step=3)
    resumed.write({"event": "train", "step": 4, "loss": 9.0})
    resumed.close()
    records = list(read_metrics(path))
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[1]["loss"] == "nan"
    assert records[-1]["loss"] == 9.0
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    "tail", [b"\xff\xfe\x00torn", b"\x00" * 100, b'{"event": "train", "st', b'{"event": "\xe9', b"7\nnull\n[1]\n"]
)
def test_what_a_lost_node_leaves_in_a_record_ends_no_later_start(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"event": "train", "step": 1})
    writer.close()
    path.write_bytes(path.read_bytes() + tail)
    assert [record["step"] for record in read_metrics(path)] == [1]
    resumed = MetricsWriter(path, resume_step=None)
    assert resumed.rewind(1, keep_warnings=True) == 1
    resumed.write({"event": "train", "step": 2})
    resumed.close()
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [1, 2]


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1"}
# deepspeed/launcher/launch.py
DEEPSPEED = {**TORCHRUN, "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2", "MASTER_PORT": "29500"}
SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = {**SHELL, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "MASTER_ADDR": "n1"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (TORCHRUN, (3, 4, 1)),
        (DEEPSPEED, (3, 4, 1)),
        (SRUN, (3, 4, 1)),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "2"}, (0, 2, 0)),  # torchrun inside a step
        (SHELL, (0, 1, 0)),  # a shell inside an allocation
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0)),
        ({}, (0, 1, 0)),
    ],
)
def test_the_launchers_variables(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], place: tuple[int, int, int]
) -> None:
    for name in {*DEEPSPEED, *SRUN}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch = read_launch()
    assert (launch.rank, launch.world_size, launch.local_rank) == place


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("new, but not all of it")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def printed(program: str) -> list[int]:
    """Numbers that a Python program prints."""
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    return list(map(int, output.split()))


def test_peak_memory_is_that_of_the_program_not_of_who_started_it() -> None:
    child = "import mepa_ds.machine as m; print(m.resident_bytes(), m.peak_resident_bytes())"
    start = f"import subprocess, sys; large = b'1' * 400_000_000; subprocess.run([sys.executable, '-c', {child!r}])"
    now, peak = printed(start)
    assert 1e6 < now <= peak < 200e6


def test_peak_memory_keeps_what_was_freed() -> None:
    now, peak = printed(
        "import mepa_ds.machine as m; large = b'1' * 400_000_000; del large; "
        "print(m.resident_bytes(), m.peak_resident_bytes())"
    )
    assert now < 200e6 < 400e6 < peak


@pytest.mark.parametrize(("number", "accepted"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_sync_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, accepted: bool
) -> None:
    """Nobody can do better there; a disk that fails is another matter."""
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with nullcontext() if accepted else pytest.raises(OSError, match="output error"):
        write_text(tmp_path / "x", "content")
