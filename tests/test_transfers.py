"""Copies between a CPU and a GPU go through pinned memory, both ways."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from mepa_ds.engine import checkpoint
from mepa_ds.engine.checkpoint import pinned_like
from mepa_ds.machine import copied_to

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("where", "pinned", "target", "pins"),
    [
        ("cpu", False, GPU, True),
        ("cpu", True, GPU, False),
        ("cuda", False, GPU, False),
        ("cpu", False, torch.device("cpu"), False),
    ],
)
def test_to_a_gpu(where: str, pinned: bool, target: torch.device, pins: bool) -> None:
    tensor = MagicMock(device=torch.device(where))
    tensor.is_pinned.return_value = pinned
    copied_to(tensor, target)
    assert tensor.pin_memory.called == pins
    (tensor.pin_memory.return_value if pins else tensor).to.assert_called_once_with(target, non_blocking=True)


@pytest.mark.parametrize(
    ("elements", "status", "registers"), [(2**20 + 5, 0, True), (2**20 + 5, 712, False), (9, 0, None)]
)
def test_from_a_gpu(monkeypatch: pytest.MonkeyPatch, elements: int, status: int, registers: bool | None) -> None:
    """Large buffers are pinned as they are, without rounding up; others, and those that cannot be, by PyTorch."""
    runtime = SimpleNamespace(cudaHostRegister=MagicMock(return_value=status))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    made = []

    def empty_like(source: torch.Tensor, device: str, pin_memory: bool = False) -> torch.Tensor:
        made.append(pin_memory)
        return torch.zeros(source.shape, dtype=source.dtype)

    monkeypatch.setattr(checkpoint.torch, "empty_like", empty_like)
    source = torch.ones(elements)
    buffer = pinned_like(source)
    assert (buffer.shape, buffer.dtype) == (source.shape, source.dtype)
    assert made[-1] == (registers is not True)
    if registers:
        runtime.cudaHostRegister.assert_called_once_with(buffer.data_ptr(), 4 * elements, 0)
    assert runtime.cudaHostRegister.called == (registers is not None)
