"""slurm/health.py without a cluster: its ranks are processes of this machine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.slurm.cluster import ROOT
from tests.tiny_run import free_port

PROGRAM = ROOT / "slurm/health.py"


def environment(folder: Path, rank: int, **more: str) -> dict[str, str]:
    """Of one of two ranks, each with a node of its own."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "RANKS_PER_NODE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "SLURMD_NODENAME": f"n{rank + 1}",
        "SLURM_JOB_NUM_NODES": "2",
        "MEPA_NODES": "n1\nn2",
        "MEPA_ACCELERATOR": "cpu",
        "MEPA_MIN_DISK_GB": "0",
        "MEPA_SCRATCH": str(folder),
        "PYTHONPATH": str(ROOT),
        **more,
    }


def two_ranks(folder: Path, state: Path, **more: str) -> list[tuple[int, list[str]]]:
    """Exit status and lines of each."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(state)],
            env=os.environ | environment(folder, rank, MASTER_PORT=port, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [rank.communicate(timeout=100)[0] for rank in ranks]
    return [(rank.returncode, text.splitlines()) for rank, text in zip(ranks, texts, strict=True)]


def test_ranks_that_are_well_say_how_fast_they_are(tmp_path: Path) -> None:
    (head, lines), other = two_ranks(tmp_path, tmp_path)
    assert (head, other) == (0, (0, []))
    assert lines[0].startswith("health: all-reduce ")
    assert lines[1:] == ["health: 2 ranks on 2 nodes are well"]


def test_a_slow_network_is_named_with_what_was_measured(tmp_path: Path) -> None:
    (head, lines), (_, rest) = two_ranks(tmp_path, tmp_path, MEPA_MIN_BANDWIDTH_GBS="1e6")
    assert (head, rest) == (1, [])
    measured = lines[0].removeprefix("health: ").split(",")[0].removesuffix(" GB/s a rank").split()[1]
    assert lines[-1].startswith("error: health: all-reduce at ")
    assert f"all-reduce at {measured} GB/s a rank, at least 1e+06 wanted" in lines[-1]
    assert "; all-to-all at " in lines[-1]


def test_all_nodes_in_trouble_stand_in_one_line(tmp_path: Path) -> None:
    """No rank ends in a traceback because the head node has left."""
    ends = two_ranks(tmp_path, tmp_path / "nowhere")
    trouble = [f"{node}: {tmp_path}/nowhere: not visible" for node in ("n1", "n2")]
    assert [status for status, _ in ends] == [1, 1]
    assert len(ends[0][1]) == 1
    assert all(text in ends[0][1][0] for text in trouble)
    assert ends[1][1] == []


@pytest.fixture
def health(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module in this process, with little patience."""
    spec = importlib.util.spec_from_file_location("health", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "MEETING_SECONDS", 1.0)
    for key, value in environment(tmp_path, 0, MASTER_PORT=str(free_port())).items():
        monkeypatch.setenv(key, value)
    return module


def test_a_node_that_does_not_answer_is_named(health: ModuleType) -> None:
    assert health.meet(0, 2, "n1", None) == ["n2: did not answer within 1 s; is it up, and its network?"]


def test_a_head_node_out_of_reach_is_told_by_the_others(health: ModuleType) -> None:
    with pytest.raises(health.LoneTroubleError, match=r"n2: cannot reach 127\.0\.0\.1:.*check MEPA_INTERFACE"):
        health.meet(1, 2, "n2", None)


def test_an_error_of_the_exchange_is_told_as_it_is(health: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken GPU is no matter of the network."""

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with ...")

    monkeypatch.setattr(health, "bandwidth", broken)
    with pytest.raises(health.LoneTroubleError, match=r"^n1: rank 0: CUDA error: uncorrectable ECC error encountered$"):
        health.meet(0, 1, "n1", None)


def test_every_rank_tries_its_own_gpu(health: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without GPUs here: what is asked of torch is noted."""
    chosen: list[int] = []
    monkeypatch.setenv("MEPA_ACCELERATOR", "cuda")
    monkeypatch.setenv("RANKS_PER_NODE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "0 GPUs visible, but 2 ranks start there" in health.local_trouble(tmp_path, [])
    monkeypatch.setattr(health.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(health.torch.cuda, "set_device", chosen.append)

    def ones(*sizes: int, device: str) -> torch.Tensor:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(health.torch, "ones", ones)
    trouble = health.local_trouble(tmp_path, [])
    assert trouble.startswith("GPU 1: CUDA error: uncorrectable ECC error encountered; take the node out")
    assert chosen == [1]
