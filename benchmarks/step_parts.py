"""Parts of a training step, forward and backward, each against the way it replaced, on the same tensors in one run.

    python benchmarks/step_parts.py --json parts.json

guidance        the alignment loss by fixed matrices; before: bicubic interpolation
inputs          the transformer's inputs from tokens, likewise (forward only)
attention       prefixes with one summed gradient; before: autograd's gradient of slices; and one call with a mask
cross-entropy   in chunks of rows; before: PyTorch's, of a transposed fp32 copy, with the accuracy
GELU            with its derivative from one sigmoid; before: PyTorch's

Ways take turns; a ratio is the median of the rounds' ratios. Attention's backward pass is timed alone as well.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.public_way import interpolated_alignment, mask_of, masked_attention
from benchmarks.step_contenders import interpolated_inputs
from mepa_ds.config.model import SCALES_256
from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.machine import cpu_name, keep_freed_memory
from mepa_ds.models.attention import prefix_attention
from mepa_ds.models.feed_forward import gelu
from mepa_ds.objective.alignment import alignment_loss
from mepa_ds.objective.cross_entropy import token_scores
from mepa_ds.scales import ScaleSchedule
from mepa_ds.tokenizer.quantizer import MultiScaleQuantizer

SCHEDULE = ScaleSchedule.of(SCALES_256)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Way = Callable[..., Tensor]
WARM_UP = 2


@dataclass
class Options:
    """Prints one line a part and type."""

    batch: int = 4
    """Images."""
    guidance_batch: int = 16
    """Images of the guidance loss."""
    heads: int = 16
    """Attention heads of width 64."""
    rounds: int = 11
    """Timed rounds, after two that warm up."""
    threads: int = 2
    """CPU threads."""
    json: Path | None = None
    """File for the figures."""


def timed(way: Way, inputs: Sequence[Tensor], with_gradient: bool) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    started = time.perf_counter()
    out = way(*inputs)
    between = time.perf_counter()
    if with_gradient:
        torch.autograd.grad(out, [x for x in inputs if x.requires_grad], torch.ones_like(out))
    return between - started, time.perf_counter() - between


def compare(
    ways: dict[str, Way], inputs: Sequence[Tensor], rounds: int, with_gradient: bool = True
) -> dict[str, float]:
    """Milliseconds of the first way, and how many times as long the others take; their backward passes alone too."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + WARM_UP):
        for name, way in ways.items():
            seconds = timed(way, inputs, with_gradient)
            if number >= WARM_UP:
                found[name].append(seconds)
    first, *others = ways
    result = {"ms": 1e3 * statistics.median(map(sum, found[first]))}
    for name in others:
        pairs = list(zip(found[name], found[first], strict=True))
        result[name] = statistics.median(sum(theirs) / sum(ours) for theirs, ours in pairs)
        if with_gradient:
            result[f"{name}, backward"] = statistics.median(theirs[1] / ours[1] for theirs, ours in pairs)
    return result


def guidance(options: Options) -> dict[str, float]:
    scales = (5, 6, 7)
    z_BLP = torch.randn(options.guidance_batch, SCHEDULE.bounds[6][1], 768, requires_grad=True)
    features_BNP = torch.randn(options.guidance_batch, 256, 768)
    ways: dict[str, Way] = {
        "ours": partial(alignment_loss, schedule=SCHEDULE, scales=scales),
        "interpolation": partial(interpolated_alignment, schedule=SCHEDULE, scales=scales),
    }
    return compare(ways, [z_BLP, features_BNP], options.rounds)


def inputs_from_tokens(options: Options) -> dict[str, float]:
    quantizer = MultiScaleQuantizer(TokenizerConfig(scales=SCALES_256)).requires_grad_(False)
    tokens_BL = torch.randint(4096, (options.batch, SCHEDULE.num_tokens))
    ways: dict[str, Way] = {
        "ours": quantizer.inputs_from_tokens,
        "interpolation": partial(interpolated_inputs, quantizer),
    }
    return compare(ways, [tokens_BL], options.rounds, with_gradient=False)


def attention(options: Options, dtype: torch.dtype) -> dict[str, float]:
    shape = (3, options.batch, options.heads, SCHEDULE.num_tokens, 64)
    q_k_v = [x.to(dtype).requires_grad_() for x in torch.randn(shape)]
    mask_11LL = mask_of(SCHEDULE, torch.device("cpu"))

    def slices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], scale=1.0)
            for start, end in SCHEDULE.bounds
        ]
        return torch.cat(parts, dim=2).transpose(1, 2)

    ways: dict[str, Way] = {
        "ours": lambda q, k, v: prefix_attention(q, k, v, SCHEDULE.bounds, 1.0),
        "slices": slices,
        "mask": lambda q, k, v: masked_attention(q, k, v, mask_11LL, 1.0).transpose(1, 2),
    }
    return compare(ways, q_k_v, options.rounds)


def cross_entropy(options: Options, dtype: torch.dtype) -> dict[str, float]:
    logits_BLV = torch.randn(options.batch, SCHEDULE.num_tokens, 4096).to(dtype).requires_grad_()
    tokens_BL = torch.randint(4096, (options.batch, SCHEDULE.num_tokens))

    def pytorchs(logits_BLV: Tensor, tokens_BL: Tensor) -> Tensor:
        logits = logits_BLV.float()
        (logits.detach().argmax(-1) == tokens_BL).float()
        return F.cross_entropy(logits.transpose(1, 2), tokens_BL, reduction="none")

    ways: dict[str, Way] = {"ours": lambda *given: token_scores(*given)[0], "PyTorch's": pytorchs}
    return compare(ways, [logits_BLV, tokens_BL], options.rounds)


def gelus(options: Options, dtype: torch.dtype) -> dict[str, float]:
    x = torch.randn(options.batch * SCHEDULE.num_tokens, 2048).to(dtype).requires_grad_()
    ways: dict[str, Way] = {"ours": gelu, "PyTorch's": partial(F.gelu, approximate="tanh")}
    return compare(ways, [x], options.rounds)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the ranks of a run do
    torch.manual_seed(0)
    machine = f"{cpu_name()}, {options.threads} threads"
    print(f"{machine}, torch {torch.__version__}; times as long as ours", flush=True)
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "guidance, fp32": partial(guidance, options),
        "inputs, fp32": partial(inputs_from_tokens, options),
    }
    for name, dtype in TYPES.items():
        parts[f"attention, {name}"] = partial(attention, options, dtype)
        parts[f"cross-entropy, {name}"] = partial(cross_entropy, options, dtype)
        parts[f"GELU, {name}"] = partial(gelus, options, dtype)
    results = {}
    for name, measure in parts.items():
        results[name] = measure()
        others = ", ".join(f"{key} {value:.2f}" for key, value in results[name].items() if key != "ms")
        print(f"{name:<20} {results[name]['ms']:8.1f} ms   {others}", flush=True)
    if options.json:
        report = {"device": machine, "torch": torch.__version__, "batch": options.batch, "parts": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
