"""Learning rate over the steps of a run."""

from __future__ import annotations

import math

from mepa_ds.config.pretrain import OptimConfig

FLAT = 0.05  # lin0's flat share of the steps after the warm-up


def peak_lr(config: OptimConfig, global_batch: int) -> float:
    """VAR's linear scaling: base_lr x global batch / 256."""
    return config.base_lr * global_batch / 256


def scales_in_step(progressive: float | None, num_scales: int, step: int, num_steps: int) -> int:
    """How many scales 0-based `step` of `num_steps` trains: VAR's progressive training (`pg`, without its warm-up).

    The first half of them (VAR's `pg0`) from the start; the others join one by one, evenly, until all are there after
    `progressive` x num_steps steps. None: all from the start.
    """
    if progressive is None:
        return num_scales
    first = -(-num_scales // 2)
    passed = min(step / (progressive * num_steps), 1.0)
    return first + math.floor((num_scales - first) * passed)


def learning_rate(config: OptimConfig, global_batch: int, step: int, num_steps: int) -> float:
    """Rate of 0-based `step` of `num_steps`: VAR's `lr_wd_annealing`.

    Linear from warmup_start x peak over the warm-up; then with p in [0, 1] the share of what remains: lin0 is flat up
    to p = 0.05 and linear to final_lr x peak at p = 1; cosine is final + (1 - final) (1 + cos(pi p)) / 2.
    """
    peak = peak_lr(config, global_batch)
    warmup_steps = round(config.warmup * num_steps)
    if step < warmup_steps:
        return peak * (config.warmup_start + (1 - config.warmup_start) * step / warmup_steps)
    passed = (step - warmup_steps) / max(num_steps - 1 - warmup_steps, 1)
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        return peak * (config.final_lr + (1 - config.final_lr) * (0.5 + 0.5 * math.cos(math.pi * passed)))
    rest = 1.0 if passed < FLAT else (1 - passed) / (1 - FLAT)
    return peak * (config.final_lr + (1 - config.final_lr) * rest)
