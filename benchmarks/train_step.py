"""A whole training step: the public way against ours, and ours with each of its gains switched off, in one run.

    python benchmarks/train_step.py --json step.json                                  (MEPA-d8, two CPU threads)
    python benchmarks/train_step.py --model mepa-d16 --batch 48 --dtypes bf16         (on a GPU)

public          plain PyTorch: tokenizer and ViT-B/14 teacher run at every step, masked attention, boolean-mask experts,
                interpolated guidance, autocast over fp32 weights, torch's AdamW (benchmarks/public_way.py)
public model    the same without tokenizer and teacher: tokens and features are given
ours            the trainer's step on stored tokens and int8 features, by the engine (ZeRO-2 on one rank)
-NAME           ours without one gain:
  -stored       tokens are encoded and features computed at every step
  -prefixes     attention by one call with a mask instead of one call a scale on its prefix
  -summed       gradients of keys and values by slices instead of summed in one buffer
  -dispatch     boolean-mask experts instead of sorted rows
  -matrices     guidance by bicubic interpolation instead of fixed matrices
  -loss         cross-entropy of a transposed copy of all logits in fp32 instead of row by row in chunks
  -engine       autocast over fp32 weights and torch's AdamW instead of the engine
compiled        ours with parallel.compile

A step is inputs, forward, backward, clipping and AdamW. Every contender runs once a round, in turn, so that a slow
moment of the machine meets all of them; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.measuring import peak_memory
from benchmarks.step_contenders import CONTENDERS, Contestants
from mepa_ds.machine import cpu_name, keep_freed_memory
from mepa_ds.objective.flops import mfu, peak_flops_per_second, step_flops

WARM_UP = 2


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
    """What is measured."""
    rounds: int = 7
    """Timed rounds, after two that warm up."""
    threads: int = 2
    """CPU threads."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda."""
    json: Path | None = None
    """File for the figures."""
    chart: Path | None = None
    """PNG of the ratios (needs matplotlib)."""


def measure(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every contender in every round."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + WARM_UP):
        for name, step in steps.items():
            wait()
            started = time.perf_counter()
            step()
            wait()
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return seconds
