"""The learning rate and the number of trained scales over the steps of a run."""

from __future__ import annotations

import math

from mepa_ds.config.pretrain import OptimConfig

FLAT = 0.05  # the share of the steps after the warm-up in which lin0 is flat


def peak_lr(config: OptimConfig, global_batch: int) -> float:
    """Returns the rate by VAR's linear scaling: base_lr x global batch / 256."""
    return config.base_lr * global_batch / 256


def scales_in_step(progressive: float | None, num_scales: int, step: int, num_steps: int) -> int:
    """Returns how many scales the 0-based `step` of `num_steps` trains (VAR's progressive training: `pg`, no warm-up).

    The first half of the scales (VAR's `pg0`) is trained from the start. The other scales join one by one, evenly,
    until all are trained after `progressive` x num_steps steps. If `progressive` is None, all are from the start.
    """
    if progressive is None:
        return num_scales
    first = -(-num_scales // 2)
    passed = min(step / (progressive * num_steps), 1.0)
    return first + math.floor((num_scales - first) * passed)


def learning_rate(config: OptimConfig, global_batch: int, step: int, num_steps: int) -> float:
    """Returns the rate of the 0-based `step` of `num_steps`, by VAR's `lr_wd_annealing`.

    Over the warm-up the rate rises linearly from warmup_start x peak. After it, let p in [0, 1] be the share of the
    remaining steps that has passed: lin0 is flat up to p = 0.05 and then linear to final_lr x peak at p = 1; cosine is
    final + (1 - final) (1 + cos(pi p)) / 2.
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
