"""One training step of ours, in parts: seconds, MFU, memory against the plan, and the kernels that take the time.

    python benchmarks/gpu_parts/step_profile.py --model mepa-d16 --batch 48 --device cuda

step      the whole step, the device waited for at its end only
parts     inputs, forward, backward and update, the device waited for after each
memory    the peak of what is allocated, against `pretrain.py --dry-run`'s plan
kernels   the device's time by kernel (torch.profiler), and the share of the step in which no kernel runs
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.gpu_parts.engine_checks import start_rank
from benchmarks.gpu_parts.timing import WARM_UP, say
from benchmarks.step_contenders import Contestants, recipe
from mepa_ds import distributed
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.machine import peak_resident_bytes
from mepa_ds.objective.flops import mfu, peak_flops_per_second, step_flops
from mepa_ds.planning.plan import Machine, plan_run

RATE = 1e-5
NUM_KERNELS = 30


@dataclass
class Options:
    """Prints a JSON line a figure."""

    model: str = "mepa-d16"
    """A preset, or `nano`."""
    batch: int = 48
    """Images."""
    dtype: str = "bf16"
    """Precision: fp32 or bf16."""
    rounds: int = 10
    """Timed steps."""
    compile: bool = False
    """The step with parallel.compile."""
    device: str = "cuda"
    """cuda or cpu."""


class Step:
    """The trainer's step on one batch, in its four parts."""

    def __init__(self, contestants: Contestants, engine: PretrainEngine):
        self._contestants, self._engine = contestants, engine
        self.parts: dict[str, Callable[[], None]] = {
            "inputs": self._inputs, "forward": self._forward, "backward": self._backward, "update": self._update
        }  # fmt: skip

    def _inputs(self) -> None:
        self._given = self._contestants.inputs.training(self._contestants.batch)

    def _forward(self) -> None:
        self._engine.begin_step()
        self._losses = self._engine.forward(self._given)

    def _backward(self) -> None:
        self._losses = self._engine.backward(self._losses)

    def _update(self) -> None:
        self._engine.update(RATE)

    def __call__(self) -> None:
        for part in self.parts.values():
            part()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def whole_steps(step: Step, device: torch.device, rounds: int) -> float:
    """Median seconds of a step."""
    seconds = []
    for number in range(rounds + WARM_UP):
        started = time.perf_counter()
        step()
        wait(device)
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def parts_of_steps(step: Step, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each part."""
    seconds: dict[str, list[float]] = {name: [] for name in step.parts}
    for _ in range(rounds):
        for name, part in step.parts.items():
            started = time.perf_counter()
            part()
            wait(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report_kernels(step: Step, device: torch.device, step_seconds: float) -> None:
    """The kernels with the most time, a line each; on a CPU its operators."""
    rounds = 3
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(rounds):
            step()
        wait(device)
    on_gpu = device.type == "cuda"
    rows = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
        for event in profiler.key_averages()
    ]
    total = sum(microseconds for microseconds, _, _ in rows) / rounds / 1e6
    say(name="kernels", seconds=total, share_of_step=total / step_seconds, different=len(rows))
    for microseconds, count, key in sorted(rows, reverse=True)[:NUM_KERNELS]:
        seconds = microseconds / rounds / 1e6
        say(name="kernel", kernel=key[:160], ms=1e3 * seconds, share=seconds / total, calls=count / rounds)


def peak_bytes(device: torch.device) -> dict[str, int]:
    """The most that was allocated, and what the allocator held; on a CPU what the process had in memory."""
    if device.type != "cuda":
        return {"peak": peak_resident_bytes()}
    return {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def report_memory(config: PretrainConfig, device: torch.device, measured: dict[str, int]) -> None:
    """What was allocated, and what the plan says."""
    on_gpu = device.type == "cuda"
    plan = plan_run(config, Machine(world_size=1, is_gpu=on_gpu, memory=None, process=0.0), num_samples=10**6)
    parts = {"backward": plan.backward, "optimizer": plan.optimizer}
    say(name="memory", **measured, planned=plan.peak, ratio=measured["peak"] / plan.peak, plan=parts)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    device = torch.device(options.device)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    start_rank()
    contestants = Contestants(options.model, options.batch, options.dtype, device)
    config = recipe(options.model, options.batch, options.dtype, compiled=options.compile)
    step = Step(contestants, PretrainEngine(config, contestants.feature_width, device))
    seconds = whole_steps(step, device, options.rounds)
    flops = step_flops(config, contestants.feature_width)
    peak = peak_flops_per_second(options.dtype)
    say(
        name="step",
        model=options.model,
        batch=options.batch,
        dtype=options.dtype,
        compiled=options.compile,
        seconds=seconds,
        images_per_second=options.batch / seconds,
        teraflops=flops / seconds / 1e12,
        mfu=None if peak is None else mfu(flops, seconds, peak, 1),
    )
    say(name="parts", **parts_of_steps(step, device, options.rounds))
    measured = peak_bytes(device)
    report_kernels(step, device, seconds)
    report_memory(config, device, measured)
    distributed.stop()


if __name__ == "__main__":
    main()
