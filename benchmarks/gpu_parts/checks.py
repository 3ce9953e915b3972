"""Whether a device computes what the CPU computes: every check of tests/gpu, without pytest.

    python benchmarks/gpu_parts/checks.py --device cuda

A JSON line a check: its errors and seconds, or why it failed. After a failure that leaves the device unusable, the
checks that follow run in a new process. Ends with 1 if a check failed.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.gpu_parts import engine_checks, model_checks
from benchmarks.gpu_parts.model_checks import Found
from benchmarks.gpu_parts.timing import say
from mepa_ds import distributed

Check = Callable[[torch.device], Found]
CHECKS: dict[str, Check] = {
    "experts by load": model_checks.experts_by_load,
    "attention": model_checks.attention,
    "objective": model_checks.objective,
    "no waits": model_checks.no_waits,
    "training inputs": engine_checks.training_inputs,
    "saved and loaded": engine_checks.saved_and_loaded,
    "tokens": model_checks.tokens,
    "greedy sampling": model_checks.greedy_sampling,
    "recomputation": model_checks.recomputation,
    "compiled": engine_checks.compiled,
}


@dataclass
class Options:
    """Prints a JSON line a check."""

    device: str = "cuda"
    """cuda or cpu."""
    only: tuple[str, ...] = ()
    """Names of checks (none: all)."""
    failed_before: bool = False
    """Whether an earlier process has seen a check fail: this one then ends with 1 too."""
    tiny: bool = False
    """Without effect: the checks are small."""


def run(name: str, device: torch.device) -> bool:
    """Runs a check and prints its line; False if it failed."""
    started = time.perf_counter()
    try:
        found = CHECKS[name](device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as failed:  # whatever it is, the other checks are still of interest
        traceback.print_exc()
        why = f"{type(failed).__name__}: {str(failed)[:600]}"
        say(name=name, ok=False, seconds=time.perf_counter() - started, failed=why)
        return False
    say(name=name, ok=True, seconds=time.perf_counter() - started, **found)
    return True


def is_usable(device: torch.device) -> bool:
    """Whether the device still answers; after an illegal access no call does."""
    try:
        return bool(torch.ones(2, device=device).sum().item() == 2)
    except RuntimeError:
        return False


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if unknown := [name for name in options.only if name not in CHECKS]:
        raise SystemExit(f"--only: {', '.join(unknown)}: expected some of {', '.join(CHECKS)}")
    device = torch.device(options.device)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    failed = options.failed_before
    names = list(options.only or CHECKS)
    for number, name in enumerate(names):
        ok = run(name, device)
        failed = failed or not ok
        if not ok and (rest := names[number + 1 :]) and not is_usable(device):
            sys.stdout.flush()
            os.execv(
                sys.executable, [sys.executable, __file__, "--device", device.type, "--failed-before", "--only", *rest]
            )
    distributed.stop()
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
