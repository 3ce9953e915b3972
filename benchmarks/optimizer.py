"""The optimizer step without its communication: the gradients' norm and AdamW, against DeepSpeed's and PyTorch's own.

DeepSpeed looks for values that are not finite and then takes the norm of an fp64 copy of each gradient; PyTorch's AdamW
is not fused by default. Both sides alternate; medians, and medians of ratios.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
import yaml
from torch import Tensor, nn

from mepa_ds.config.optim import PretrainOptimConfig
from mepa_ds.engine.gradients import sum_of_squares
from mepa_ds.engine.optimizer import build_optimizer
from mepa_ds.machine import cpu_name


@dataclass
class Options:
    """Size and length of the measurement."""

    millions: int = 20
    """Weights."""
    rounds: int = 7
    """Calls of each."""
    threads: int = 1
    """Threads of a CPU."""
    json: Path | None = None
    """Where the numbers go as well."""


def main(options: Options) -> None:
    from deepspeed.runtime.utils import has_inf_or_nan

    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(1000 * options.millions, 1000, device=device, generator=generator))
    model.weight.grad = torch.randn(model.weight.shape, device=device, generator=generator)
    config = PretrainOptimConfig()
    fused = build_optimizer(model, config, width=64)
    plain = torch.optim.AdamW([model.weight], lr=config.base_lr, betas=config.betas, eps=config.eps)
    gradients: list[Tensor] = [model.weight.grad.view(-1)]

    def deepspeeds_norm() -> float:
        assert not any(bool(has_inf_or_nan(gradient)) for gradient in gradients)
        norms = [torch.linalg.vector_norm(gradient.to(torch.double), ord=2.0) for gradient in gradients]
        return float(torch.stack(norms).pow(2).sum().float().sqrt())

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "norm": (deepspeeds_norm, lambda: float(sum_of_squares(gradients).sqrt())),
        "AdamW": (plain.step, fused.step),
    }
    report: dict[str, object] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()}
    for name, pair in pairs.items():
        times = [[_seconds(call) for call in pair] for _ in range(options.rounds + 1)][1:]  # the first makes the state
        before, after = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(theirs / ours for theirs, ours in times)
        report[name] = {"before_ms": 1000 * before, "ours_ms": 1000 * after, "ratio": ratio}
    print(yaml.safe_dump(report, sort_keys=False))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2))


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
