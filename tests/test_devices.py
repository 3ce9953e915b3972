"""Which ranks compute on GPUs: a machine that has fewer of them than ranks, nodes, and the environment's word."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from mepa_ds import distributed
from mepa_ds.distributed import Launch, SetupError, choose_device, device_of, read_launch, uses_gpu


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", distributed.ACCELERATOR):
        monkeypatch.delenv(name, raising=False)


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int, accelerator: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus if os.environ["CUDA_VISIBLE_DEVICES"] else 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all")
    if accelerator is not None:
        monkeypatch.setenv(distributed.ACCELERATOR, accelerator)


@pytest.mark.parametrize(
    ("gpus", "accelerator", "launch", "device"),
    [
        (0, None, Launch(0, 1, 0), "cpu"),
        (0, None, Launch(1, 2, 1, 2), "cpu"),
        (1, None, Launch(0, 1, 0), "cuda:0"),
        (1, None, Launch(0, 2, 0, 2), "cpu"),  # one GPU for two ranks: NCCL would refuse
        (1, None, Launch(1, 2, 1, 2), "cpu"),
        (2, None, Launch(1, 2, 1, 2), "cuda:1"),
        (8, None, Launch(11, 16, 3, 8), "cuda:3"),
        (8, "cuda", Launch(11, 16, 3, 8), "cuda:3"),
        (8, "cpu", Launch(3, 8, 3, 8), "cpu"),
        (4, "cpu", Launch(3, 16, 3, 8), "cpu"),
        (1, None, Launch(3, 4, 3), "cuda:0"),  # srun has given each rank a GPU of its own
    ],
)
def test_the_device_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, gpus: int, accelerator: str | None, launch: Launch, device: str
) -> None:
    machine(monkeypatch, gpus, accelerator)
    assert device_of(launch) == choose_device(launch) == torch.device(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if gpus and device == "cpu" else "all")


@pytest.mark.parametrize(
    ("gpus", "accelerator", "launch", "message"),
    [
        (1, "cuda", Launch(0, 2, 0, 2), "1 GPUs for 2 ranks; start as many ranks as a node has GPUs, or set MEPA_ACC"),
        (0, "cuda", Launch(0, 1, 0), "0 GPUs for 1 ranks"),
        (4, None, Launch(8, 16, 0, 8), "4 GPUs for 8 ranks"),  # other nodes may have 8
        (1, "tpu", Launch(0, 1, 0), "MEPA_ACCELERATOR=tpu: expected cpu or cuda"),
    ],
)
def test_gpus_that_were_asked_for_and_are_not_there(
    monkeypatch: pytest.MonkeyPatch, gpus: int, accelerator: str | None, launch: Launch, message: str
) -> None:
    machine(monkeypatch, gpus, accelerator)
    with pytest.raises(SetupError, match=message):
        choose_device(launch)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_main_rank_says_that_gpus_are_left_idle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    machine(monkeypatch, 1, None)
    choose_device(Launch(rank, 2, rank, 2))
    line = "2 ranks, but 1 GPU on this machine: all ranks compute on the CPU, with gloo\n"
    assert capsys.readouterr().err == (line if rank == 0 else "")


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_a_process_knows_by_its_launcher(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    machine(monkeypatch, 1, None)
    assert uses_gpu()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", variable: "2"}.items():
        monkeypatch.setenv(name, value)
    assert read_launch().local_world_size == 2
    assert not uses_gpu()


def test_nccl_is_bound_to_the_gpu_and_gloo_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda kind, **rest: calls.append({"kind": kind, **rest})
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    machine(monkeypatch, 1, None)
    assert distributed.start(Launch(0, 1, 0)) == torch.device("cuda", 0)
    assert distributed.start(Launch(0, 2, 0, 2)) == torch.device("cpu")
    assert [(call["kind"], call["device_id"]) for call in calls] == [("nccl", torch.device("cuda", 0)), ("gloo", None)]


def test_deepspeed_takes_the_cpu_too() -> None:
    """As a rank of two on a machine with one GPU sees it."""
    code = (
        "import torch, os; torch.cuda.device_count = lambda: 1; "
        "import mepa_ds.engine; print(os.environ.get('DS_ACCELERATOR'), repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    )
    environment = {
        key: value for key, value in os.environ.items() if key not in (distributed.ACCELERATOR, "DS_ACCELERATOR")
    }
    seen = []
    for place in ({}, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"CUDA_VISIBLE_DEVICES": "all"} | place,
            capture_output=True,
            text=True,
        )
        seen.append(result.stdout.strip())
    assert seen == ["None 'all'", "cpu ''"]
