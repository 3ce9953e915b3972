"""Time and memory of the formulas of scores, each in a process of its own.

    python benchmarks/scores.py --json FILE                       # 50 000 images against 50 000, 2048 features
    python benchmarks/scores.py --samples 50000 --reference 10000 --json FILE    # as with ADM's reference

The features are drawn: 100 clusters in 64 dimensions, turned into as many features as asked, with noise, like those
of a network.
"""

from __future__ import annotations

import multiprocessing
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from mepa_ds import distributed
from mepa_ds.command_line import entry
from mepa_ds.evaluation import Gaussian, fd_infinity, frechet_distance, kid, precision_recall
from mepa_ds.evaluation.formulas.gaussian import FrechetTo
from mepa_ds.evaluation.formulas.manifold import manifold
from mepa_ds.files import write_json
from mepa_ds.machine import peak_resident_bytes

_CLUSTERS, _DIMENSIONS = 100, 64


@dataclass(frozen=True)
class Options:
    """Measure the formulas of scores."""

    json: Path | None = None
    """Write the numbers here."""
    samples: int = 50_000
    """Generated images."""
    reference: int = 50_000
    """Real images."""
    width: int = 2048
    """Features of an image."""
    parts: tuple[str, ...] = ("fid", "fid_with_error", "precision_recall", "all_neighbours", "kid", "fd_infinity")
    """Which of them."""


def fid(samples_ND: Tensor, real_MD: Tensor, device: torch.device) -> float:
    first, second = Gaussian.of(samples_ND), Gaussian.of(real_MD)
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance, device)


def fid_with_error(samples_ND: Tensor, real_MD: Tensor, device: torch.device) -> float:
    return FrechetTo(Gaussian.of(real_MD), device).distance(samples_ND)[0]


def precision(samples_ND: Tensor, real_MD: Tensor, device: torch.device) -> float:
    return precision_recall(real_MD, samples_ND, device=device)[0]


def all_neighbours(samples_ND: Tensor, real_MD: Tensor, device: torch.device) -> float:
    return float(manifold(real_MD, samples_ND, device=device).density_M.mean())


def kid_of_ten_thousand(samples_ND: Tensor, real_MD: Tensor, device: torch.device) -> float:
    return kid(real_MD[:10_000], samples_ND[:10_000], device).value


def infinity(samples_ND: Tensor, real_MD: Tensor, device: torch.device) -> float:
    reference = Gaussian.of(real_MD)
    return fd_infinity(reference.mean, reference.covariance, samples_ND, device=device)


PARTS: dict[str, Callable[[Tensor, Tensor, torch.device], float]] = {
    "fid": fid,
    "fid_with_error": fid_with_error,
    "precision_recall": precision,
    "all_neighbours": all_neighbours,
    "kid": kid_of_ten_thousand,
    "fd_infinity": infinity,
}


def features(count: int, width: int, seed: int) -> Tensor:
    """(count, width) float32; of another seed they are from the same clusters."""
    shared = torch.Generator().manual_seed(0)
    centres_KC = 2 * torch.randn(_CLUSTERS, _DIMENSIONS, generator=shared)
    turn_CD = torch.randn(_DIMENSIONS, width, generator=shared) / _DIMENSIONS**0.5
    own = torch.Generator().manual_seed(seed)
    cluster_N = torch.randint(_CLUSTERS, (count,), generator=own)
    latent_NC = centres_KC[cluster_N] + torch.randn(count, _DIMENSIONS, generator=own)
    return (latent_NC @ turn_CD).relu_().add_(torch.randn(count, width, generator=own), alpha=0.1)


def measure(part: str, options: Options, queue: Any) -> None:
    device = distributed.device_of(distributed.read_launch())
    samples_ND = features(options.samples, options.width, 1).to(device)
    real_MD = features(options.reference, options.width, 2).to(device)
    wall, cpu = time.perf_counter(), time.process_time()
    value = PARTS[part](samples_ND, real_MD, device)
    queue.put(
        {
            "value": value,
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "peak_gib": peak_resident_bytes() / 2**30,
            "gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
        }
    )


def main(options: Options) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {}
    for part in options.parts:
        queue = context.Queue()
        process = context.Process(target=measure, args=(part, options, queue))
        process.start()
        found[part] = queue.get()
        process.join()
        print(
            f"{part:<18} {found[part]['seconds']:8.1f} s  {found[part]['cpu_seconds']:8.1f} s of cores  "
            f"{found[part]['peak_gib']:5.1f} GiB   {found[part]['value']:.6g}",
            flush=True,
        )
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": distributed.device_of(distributed.read_launch()).type,
        },
        "options": {name: value for name, value in asdict(options).items() if name != "json"},
        "parts": found,
    }
    if options.json is not None:
        write_json(options.json, result)
    return result


if __name__ == "__main__":
    entry.run(lambda: main(tyro.cli(Options, description=__doc__)))
