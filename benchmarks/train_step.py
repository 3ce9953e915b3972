"""A whole training step: the public way against ours, and ours with each of its gains switched off, in one run.

    python benchmarks/train_step.py --json step.json                                  (MEPA-d8, two CPU threads)
    python benchmarks/train_step.py --model mepa-d16 --batch 48 --dtypes bf16         (on a GPU)

public          plain PyTorch: tokenizer and ViT-B/14 teacher run at every step, masked attention, boolean-mask experts,
                interpolated guidance, autocast over fp32 weights, torch's AdamW (benchmarks/public_way.py)
public model    the same without tokenizer and teacher: tokens and features are given
ours            the trainer's step on stored tokens and int8 features, by the engine (ZeRO-2 on one rank)
no-NAME         ours without one gain:
  no-stored      tokens are encoded and features computed at every step
  no-prefixes    attention by one call with a mask instead of one call a scale on its prefix
  no-summed      gradients of keys and values by slices instead of summed in one buffer
  no-dispatch    boolean-mask experts instead of sorted rows
  no-matrices    guidance by bicubic interpolation instead of fixed matrices
  no-loss        cross-entropy of a transposed copy of all logits in fp32 instead of row by row in chunks
  no-engine      autocast over fp32 weights and torch's AdamW instead of the engine
compiled        ours with parallel.compile
dense           ours with a dense FFN in place of the experts; of equal FLOPs for mepa-dN-iso

A step is inputs, forward, backward, clipping and AdamW, each on another batch. In every round each contender takes its
turn between two turns of ours, and is compared with their mean; a ratio is the median over rounds, so that a slow
minute of the machine counts on both sides. A turn is two steps, of which the first is not timed: libraries keep what
they have prepared for the sizes of the latest products, and another contender's are none that a run would meet.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.measuring import peak_memory
from benchmarks.step_contenders import ALL, CONTENDERS, Contestants
from mepa_ds.machine import cpu_name, keep_freed_memory
from mepa_ds.objective.flops import mfu, peak_flops_per_second, step_flops

WARM_UP = 1


@dataclass
class Options:
    """Prints one table a model, batch and type; ratios are taken within a run."""

    model: str = "mepa-d8"
    """A preset: var-dN, mepa-dN, mepa-dN-iso; `nano` is two blocks of width 128."""
    batch: int = 2
    """Images a step."""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    """Precision: fp32, bf16."""
    contenders: tuple[str, ...] = CONTENDERS
    """What is measured beside ours."""
    rounds: int = 5
    """Timed rounds, after one that warms up."""
    threads: int = 2
    """CPU threads."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda."""
    json: Path | None = None
    """File for the figures."""
    chart: Path | None = None
    """PNG of the ratios (needs matplotlib)."""


class Times(NamedTuple):
    """Seconds of one contender's step in every round, and of ours around it."""

    own: list[float]
    ours: list[float]

    @property
    def ratio(self) -> float:
        """How many times as long as ours it takes: the median over rounds."""
        return statistics.median(own / ours for own, ours in zip(self.own, self.ours, strict=True))


def measure(steps: Mapping[str, Callable[[], None]], rounds: int, device: str) -> dict[str, Times]:
    """Times of every contender. `steps` has "ours", which takes a turn before and after each other."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def turn(step: Callable[[], None]) -> float:
        step()
        wait()
        started = time.perf_counter()
        step()
        wait()
        return time.perf_counter() - started

    others = [name for name in steps if name != "ours"]
    times = {name: Times([], []) for name in steps}
    before = turn(steps["ours"])
    for number in range(rounds + WARM_UP):
        for name in others or ["ours"]:
            seconds = turn(steps[name])
            after = turn(steps["ours"])
            if number >= WARM_UP:
                times[name].own.append(seconds)
                times[name].ours.append((before + after) / 2)
                if name != "ours":
                    times["ours"].own.append(after)
                    times["ours"].ours.append(after)
            before = after
    return times


def one_case(options: Options, dtype: str) -> dict[str, Any]:
    """Figures of all contenders in one type."""
    device = torch.device(options.device)
    contestants = Contestants(options.model, options.batch, dtype, device)
    steps = {name: contestants.step(name) for name in ("ours", *options.contenders)}
    times = measure(steps, options.rounds, options.device)
    config = contestants.config
    flops = step_flops(config, contestants.feature_width)
    peak = peak_flops_per_second(dtype) if options.device == "cuda" else None
    results = {}
    for name, step in steps.items():
        median = statistics.median(times[name].own)
        results[name] = {
            "seconds": median,
            "fastest_seconds": min(times[name].own),
            "times_as_long_as_ours": times[name].ratio,
            "images_per_second": options.batch / median,
            "tokens_per_second": options.batch * config.model.schedule.num_tokens / median,
            "tflops": flops / median / 1e12,
            "mfu": None if peak is None else mfu(flops, median, peak, 1),
            "peak_mib": peak_memory(step, options.device),
        }
    return {"model": options.model, "batch": options.batch, "dtype": dtype, "results": results}


def lines_of(case: dict[str, Any]) -> list[str]:
    """One case as a table."""
    lines = [f"{case['model']}, {case['batch']} images, {case['dtype']}"]
    lines.append(f"{'':<14} {'ms':>9} {'images/s':>9} {'TFLOP/s':>8} {'MFU':>6} {'MiB':>7} {'x ours':>7}")
    for name, found in case["results"].items():
        share = "" if found["mfu"] is None else f"{100 * found['mfu']:.1f} %"
        speed = f"{found['images_per_second']:9.2f} {found['tflops']:8.3g} {share:>6} {found['peak_mib']:7.0f}"
        lines.append(f"{name:<14} {1e3 * found['seconds']:9.1f} {speed} {found['times_as_long_as_ours']:7.2f}")
    for base, what in (("public", "whole step"), ("public model", "model only")):
        if base in case["results"]:
            lines.append(f"{what}: ours is {case['results'][base]['times_as_long_as_ours']:.2f} times as fast")
    return lines


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """A bar a contender: how many times as long as ours it takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(cases), figsize=(5 * len(cases), 4), squeeze=False, layout="constrained")
    for axis, case in zip(axes[0], cases, strict=True):
        names = [name for name in case["results"] if name != "ours"][::-1]
        times = [case["results"][name]["times_as_long_as_ours"] for name in names]
        axis.bar_label(axis.barh(names, times, color="tab:blue"), fmt="%.2f", padding=3)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xlabel("times as long as ours")
        axis.set_title(f"{case['model']}, {case['batch']} images, {case['dtype']}")
        axis.set_xlim(0, 1.15 * max(times, default=1))
    figure.savefig(path, dpi=120)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    unknown = [name for name in options.contenders if name not in ALL]
    if unknown:
        raise SystemExit(f"--contenders: {', '.join(unknown)}: expected some of {', '.join(ALL)}")
    os.environ.setdefault("DS_ACCELERATOR", options.device)
    os.environ.setdefault("LOCAL_RANK", "0")
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        keep_freed_memory()  # as the ranks of a run do
    backend = "nccl" if options.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{cpu_name()}, {options.threads} threads"
    print(f"{machine}, torch {torch.__version__}", flush=True)
    cases = []
    for dtype in options.dtypes:
        cases.append(one_case(options, dtype))
        print("\n".join(lines_of(cases[-1])), flush=True)
    if options.json:
        report = {"device": machine, "torch": torch.__version__, "threads": options.threads, "cases": cases}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.chart:
        draw(cases, options.chart)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
