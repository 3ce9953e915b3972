"""Block-causal attention of all scales, forward and backward, in the ways that a GPU has for it.

    python benchmarks/gpu_parts/attention.py --device cuda

prefixes       the model's own: one call without a mask for each scale, on all positions up to its end
masked         one call with a mask over all positions, as VAR has it
masked 1-7     one masked call for scales 1 to 7, and a call on its prefix for each of the last three
flex           FlexAttention with a block mask, compiled

TFLOP/s count the work that the mask leaves (62 % at 256 px). `error` is the largest difference of the output to fp32.
Backends other than PyTorch's choice are timed for `prefixes`. Shapes are those of VAR-d16: 16 heads of 64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.gpu_parts.ceilings import SCALES_256
from benchmarks.gpu_parts.timing import milliseconds, relative_error, say, with_gradients
from mepa_ds.models.attention import prefix_attention
from mepa_ds.scales import ScaleSchedule

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values (B, H, L, D) -> (B, L, H, D)."""
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass
class Options:
    """Prints a JSON line a way and batch."""

    device: str = "cuda"
    """cuda or cpu."""
    tiny: bool = False
    """Sizes of no interest, to see that every line runs."""


def masked(schedule: ScaleSchedule, device: torch.device, dtype: torch.dtype) -> Attention:
    scale_L = schedule.scale_index_L(device)
    mask_11LL = torch.where(scale_L[:, None] >= scale_L, 0.0, -torch.inf)[None, None].to(dtype)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask_11LL, scale=1.0).transpose(1, 2)


def masked_then_prefixes(
    schedule: ScaleSchedule, device: torch.device, dtype: torch.dtype, num_masked: int
) -> Attention:
    """One call with a mask for the first scales, which are short, and one on its prefix for each later scale."""
    length = schedule.bounds[num_masked - 1][1]
    short = masked(ScaleSchedule.of(schedule.sides[:num_masked]), device, dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [short(q[:, :, :length], k[:, :, :length], v[:, :, :length])]
        for start, end in schedule.bounds[num_masked:]:
            part = F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], scale=1.0)
            parts.append(part.transpose(1, 2))
        return torch.cat(parts, dim=1)

    return attend


def flex(schedule: ScaleSchedule, device: torch.device) -> Attention:
    scale_L = schedule.scale_index_L(device)
    L = schedule.num_tokens

    def may_look(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return scale_L[query] >= scale_L[key]

    mask = create_block_mask(may_look, None, None, L, L, device=str(device))
    call: Any = torch.compile(flex_attention) if device.type == "cuda" else flex_attention
    return lambda q, k, v: call(q, k, v, block_mask=mask, scale=1.0).transpose(1, 2)


def ways_of(schedule: ScaleSchedule, num_masked: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Functions that make each way."""
    return {
        "prefixes": lambda: lambda q, k, v: prefix_attention(q, k, v, schedule.bounds, 1.0),
        "masked": lambda: masked(schedule, device, dtype),
        f"masked 1-{num_masked}": lambda: masked_then_prefixes(schedule, device, dtype, num_masked),
        "flex": lambda: flex(schedule, device),
    }


def figures(make: Callable[[], Attention], inputs: list[Tensor], exact: Tensor, pairs: int) -> dict[str, Any]:
    """Times and rates of one way; `pairs` of query and key are left by the mask."""
    attend, device = make(), exact.device
    error = relative_error(attend(*inputs)[: len(exact)], exact)
    with torch.no_grad():
        forward = milliseconds(lambda: attend(*inputs), device)
    both = milliseconds(with_gradients(attend, inputs), device)
    flops = 4 * inputs[0].shape[0] * inputs[0].shape[1] * inputs[0].shape[3] * pairs
    return {
        "forward_ms": forward,
        "with_gradient_ms": both,
        "forward_teraflops": flops / forward / 1e9,
        "with_gradient_teraflops": 3 * flops / both / 1e9,
        "error": error,
    }


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    device = torch.device(options.device)
    schedule = ScaleSchedule.of((1, 2, 3, 4) if options.tiny else SCALES_256)
    H, D, dtype = (2, 16, torch.float32) if options.tiny else (16, 64, torch.bfloat16)
    pairs = sum((end - start) * end for start, end in schedule.bounds)
    ways = ways_of(schedule, 2 if options.tiny else 7, device, dtype)
    runs = [(name, "", ways[name]) for name in ways]
    runs += [("prefixes", backend, ways["prefixes"]) for backend in BACKENDS if device.type == "cuda"]
    for batch in (1,) if options.tiny else (64, 16):
        torch.manual_seed(0)
        q, k, v = (torch.randn(batch, H, schedule.num_tokens, D, device=device) for _ in range(3))
        q, k = 4 * F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        exact = prefix_attention(q[:2], k[:2], v[:2], schedule.bounds, 1.0)
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v)]
        for name, backend, make in runs:
            result: dict[str, Any] = {"name": name, "batch": batch} | ({"backend": backend} if backend else {})
            try:
                with sdpa_kernel(BACKENDS[backend]) if backend else nullcontext():
                    say(**result, **figures(make, inputs, exact, pairs))
            except Exception as failed:  # one way may not exist here: the others are still of interest
                say(**result, failed=f"{type(failed).__name__}: {str(failed)[:300]}")


if __name__ == "__main__":
    main()
