"""The learning rate, the number of trained scales and the strength of guidance over the steps of a run."""

from __future__ import annotations

import math

from mepa_ds.config.optim import OptimConfig
from mepa_ds.errors import UserError

_REFERENCE_BATCH = 256  # of optim.base_lr
FLAT = 0.05  # the share of the steps after the warm-up in which lin0 is flat


def peak_lr(config: OptimConfig, global_batch: int) -> float:
    """Returns the rate by VAR's linear scaling: base_lr x global batch / 256."""
    return config.base_lr * global_batch / _REFERENCE_BATCH


def base_lr_of(peak: float, global_batch: int) -> float:
    """Returns the optim.base_lr with which `peak_lr` is `peak`."""
    return peak * _REFERENCE_BATCH / global_batch


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


def guidance_strength(until: float | None, step: int, num_steps: int) -> float:
    """Returns the share of alignment.weight that the 0-based `step` of `num_steps` has: 1 - step / (until x num_steps),
    at least 0. Always 1 if `until` is None.
    """
    return 1.0 if until is None else max(1 - step / (until * num_steps), 0.0)


def phase_steps(config: OptimConfig, num_steps: int) -> tuple[int, int]:
    """Returns the number of steps of the warm-up, and the number of steps of wsd's cooldown at the end of the run."""
    warmup = config.warmup_steps if config.warmup_steps is not None else round(config.warmup * num_steps)
    return warmup, round(config.cooldown * num_steps) if config.schedule == "wsd" else 0


def check_phases(config: OptimConfig, num_steps: int) -> None:
    """Raises UserError when wsd's warm-up and cooldown do not fit into the steps of the run."""
    warmup, cooldown = phase_steps(config, num_steps)
    if config.schedule == "wsd" and warmup + cooldown > num_steps:
        raise UserError(
            f"optim.schedule: wsd: {warmup} steps of warm-up and {cooldown} of cooldown do not fit into the "
            f"{num_steps} steps of this run; train longer, or lower optim.warmup_steps (or optim.warmup) or "
            "optim.cooldown",
            agreed=True,
        )


def learning_rate(config: OptimConfig, global_batch: int, step: int, num_steps: int) -> float:
    """Returns the rate of the 0-based `step` of `num_steps`, by VAR's `lr_wd_annealing`.

    Over the warm-up the rate rises linearly from warmup_start x peak. After it, let p in [0, 1] be the share of the
    remaining steps that has passed: lin0 is flat up to p = 0.05 and then linear to final_lr x peak at p = 1; cosine is
    final + (1 - final) (1 + cos(pi p)) / 2.

    wsd (arXiv 2405.18392) stays at the peak until only its c = round(cooldown x num_steps) last steps are left. The
    i-th of these, i = 1..c, has the rate final + (1 - final) (1 - sqrt(i / c)), so the last step has final_lr x peak,
    as with lin0 and cosine. The rates of steps before num_steps - c depend on num_steps only through the warm-up, and
    not at all if its length is given as warmup_steps.
    """
    peak = peak_lr(config, global_batch)
    warmup_steps, cooldown_steps = phase_steps(config, num_steps)
    if step < warmup_steps:
        return peak * (config.warmup_start + (1 - config.warmup_start) * step / warmup_steps)
    if config.schedule == "wsd":
        cooled = step + 1 - (num_steps - cooldown_steps)
        if cooled <= 0:
            return peak
        return peak * (config.final_lr + (1 - config.final_lr) * (1 - math.sqrt(cooled / cooldown_steps)))
    passed = (step - warmup_steps) / max(num_steps - 1 - warmup_steps, 1)
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        return peak * (config.final_lr + (1 - config.final_lr) * (0.5 + 0.5 * math.cos(math.pi * passed)))
    rest = 1.0 if passed < FLAT else (1 - passed) / (1 - FLAT)
    return peak * (config.final_lr + (1 - config.final_lr) * rest)
