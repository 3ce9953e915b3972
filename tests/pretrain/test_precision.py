"""A precision that the hardware does not have is one message, before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mepa_ds import distributed, precision
from tests.ranks import Ranks, arguments
from tests.tiny_run import make_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("precision")
    make_run(root)
    return root


@pytest.mark.parametrize("has_fp16", [True, False])
def test_onednn_says_whether_a_cpu_has_fp16(has_fp16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: has_fp16)
    assert precision.is_supported("fp16", CPU) == has_fp16
    assert precision.is_supported("bf16", CPU)
    assert precision.is_supported("fp32", CPU)


def test_a_build_without_onednn_has_no_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> bool:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_is_mkldnn_fp16_supported'")

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", missing)
    assert not precision.is_supported("fp16", CPU)


@pytest.mark.parametrize(("capability", "supported"), [((6, 0), False), ((7, 0), True), ((9, 0), True)])
def test_a_gpu_has_fp16_from_volta_on(
    capability: tuple[int, int], supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.is_supported("fp16", torch.device("cuda", 0)) == supported


def without_fp16_on_rank_1() -> None:
    """Runs in each rank's process before the run: nodes of a cluster need not be alike."""
    lacks = distributed.read_launch().rank == 1
    original = precision.is_supported
    precision.is_supported = lambda name, device: not lacks if name == "fp16" else original(name, device)  # type: ignore[assignment]


def test_one_rank_without_fp16_is_one_message_on_all(folder: Path) -> None:
    settings = ["parallel.precision=fp16", "parallel.ep_size=1"]
    log = folder / "fp16.log"
    with Ranks(arguments(folder, "fp16", *settings), 2, log, without_fp16_on_rank_1) as ranks:
        assert ranks.wait() == [2, 2], log.read_text()
    text = log.read_text()
    message = "parallel.precision: this CPU cannot train in fp16; set it to bf16 or fp32"
    assert text.count(f"error: rank 1: {message}") == 1, text
    assert "Traceback" not in text
    assert not (folder / "fp16").exists()
