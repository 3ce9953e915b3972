"""What this device can do at best: the ceilings that other parts are read against.

    python benchmarks/gpu_parts/ceilings.py --device cuda

copy         bytes read and written per second by a copy
gelu         the same by PyTorch's GELU (tanh), an elementwise operator of this model
gemm         FLOP/s of matrix products: square ones, and those of an FFN of MEPA-d16 at 48 images
grouped      FLOP/s of grouped products of the same size, over 8 and 64 experts
bicubic      guidance's enlargement of scales 1 to 7, forward and backward: F.interpolate against fixed matrices
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.gpu_parts.timing import milliseconds, relative_error, say, with_gradients
from mepa_ds.models.moe.experts import has_grouped_kernel
from mepa_ds.objective.alignment import aggregates
from mepa_ds.scales import ScaleSchedule

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@dataclass
class Options:
    """Prints a JSON line a result."""

    device: str = "cuda"
    """cuda or cpu."""
    tiny: bool = False
    """Sizes of no interest, to see that every line runs."""


def copies(device: torch.device, elements: int) -> None:
    source = torch.randn(elements, device=device).to(torch.bfloat16)
    target = torch.empty_like(source)
    traffic = 2 * source.numel() * source.element_size()
    for name, step in (
        ("copy", lambda: target.copy_(source)),
        ("gelu", lambda: torch.ops.aten.gelu.out(source, approximate="tanh", out=target)),
    ):
        ms = milliseconds(step, device)
        say(name=name, gigabytes=traffic / 1e9, ms=ms, terabytes_per_second=traffic / ms / 1e9)


def products(device: torch.device, shapes: list[tuple[int, int, int]]) -> None:
    """(M, K) times (K, N), on random data: a GPU is faster on zeros."""
    kinds = [("bf16", torch.bfloat16, "highest"), ("fp32", torch.float32, "highest"), ("tf32", torch.float32, "high")]
    for M, K, N in shapes:
        for name, dtype, precision in kinds:
            torch.set_float32_matmul_precision(precision)
            x_MK, w_NK = torch.randn(M, K, device=device).to(dtype), torch.randn(N, K, device=device).to(dtype)
            ms = milliseconds(lambda x_MK=x_MK, w_NK=w_NK: F.linear(x_MK, w_NK), device, rounds=10)  # type: ignore[misc]
            say(name="gemm", dtype=name, shape=[M, K, N], ms=ms, teraflops=2 * M * K * N / ms / 1e9)
    torch.set_float32_matmul_precision("highest")


def grouped_products(device: torch.device, rows: int, width: int, hidden: int) -> None:
    for E in (8, 64):
        x_RC = torch.randn(rows, width, device=device).to(torch.bfloat16)
        w_EFC = torch.randn(E, hidden, width, device=device).to(torch.bfloat16)
        ends_E = torch.linspace(rows / E, rows, E, device=device).round().to(torch.int32)
        ms = milliseconds(
            lambda x=x_RC, w=w_EFC, ends=ends_E: F.grouped_mm(x, w.transpose(1, 2), offs=ends),  # type: ignore[misc]
            device,
            rounds=10,
        )
        flops = 2 * rows * width * hidden
        native = has_grouped_kernel([x_RC, w_EFC])
        say(name="grouped", experts=E, shape=[rows, width, hidden], native=native, ms=ms, teraflops=flops / ms / 1e9)


def interpolated(z_BLP: Tensor, schedule: ScaleSchedule, grid_side: int, last: int) -> Tensor:
    """Guidance's aggregate of scales 1 to `last` as public code computes it: (B, N, P) fp32."""
    total_BPGG = z_BLP.new_zeros(len(z_BLP), z_BLP.shape[2], grid_side, grid_side, dtype=torch.float32)
    for (start, end), side in zip(schedule.bounds[:last], schedule.sides, strict=False):
        z_BPss = z_BLP[:, start:end].float().transpose(1, 2).unflatten(2, (side, side))
        total_BPGG = total_BPGG + F.interpolate(z_BPss, size=(grid_side, grid_side), mode="bicubic")
    return total_BPGG.flatten(2).transpose(1, 2)


def enlargements(device: torch.device, batch: int, width: int) -> None:
    schedule, last = ScaleSchedule.of(SCALES_256), 7
    torch.manual_seed(0)
    length = schedule.bounds[last - 1][1]
    z_BLP = torch.randn(batch, length, width, device=device).to(torch.bfloat16).requires_grad_()
    ways = {
        "interpolate": lambda z: interpolated(z, schedule, 16, last),
        "matrices": lambda z: next(iter(aggregates(z, schedule, 16, [last]))),
    }
    results = {}
    for name, way in ways.items():
        results[name] = way(z_BLP)
        with torch.no_grad():
            forward = milliseconds(lambda way=way: way(z_BLP), device, rounds=5)  # type: ignore[misc]
        both = milliseconds(with_gradients(way, [z_BLP]), device, rounds=5)
        say(name="bicubic", way=name, shape=list(z_BLP.shape), forward_ms=forward, with_gradient_ms=both)
    say(name="bicubic difference", relative=relative_error(results["matrices"], results["interpolate"]))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    device = torch.device(options.device)
    tiny = options.tiny
    copies(device, 2**10 if tiny else 2**30)
    products(device, [(16, 16, 16)] if tiny else [(8192, 8192, 8192), (32640, 1024, 4096), (32640, 4096, 1024)])
    grouped_products(device, *((128, 16, 32) if tiny else (65280, 1024, 4096)))
    enlargements(device, *((1, 4) if tiny else (48, 768)))


if __name__ == "__main__":
    main()
