"""How the parts of benchmarks/gpu.py measure, and how they say what they found."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3


def say(**result: Any) -> None:
    """Prints a result as one JSON line, at once: what follows may be killed."""
    print(json.dumps(result), flush=True)


def milliseconds(step: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """The median of the rounds. On a GPU the device's own time between two events, without the host's."""
    for _ in range(WARM_UP):
        step()
    if device.type != "cuda":
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        return 1e3 * statistics.median(seconds)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in events:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    """A step that computes `function` and the gradients of the inputs that require them."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    gradient = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), wanted, gradient)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value of `expected`, in fp64 on the CPU."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    assert found.shape == expected.shape, f"{tuple(found.shape)} against {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def check_close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> float:
    """The relative error; an AssertionError above the tolerance (or if it is NaN)."""
    error = relative_error(found, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed is {tolerance:.0e}"
    return error
