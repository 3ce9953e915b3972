"""Sampling against a plain re-implementation of VAR's loop, on the same weights, in one run.

    python benchmarks/sampling.py --json sampling.json

plain fp32    VAR's loop: conditional and unconditional rows through every block at every scale, AdaLN projected anew at
              each scale, keys and values concatenated scale by scale
plain bf16    the same under autocast, as VAR's demo runs it
ours fp32     mepa_ds.sample
ours bf16     mepa_ds.sample with the model in bf16

Weights are random (VAR-d16's shapes); images are made with top_k = 1, so both must pick the same codes in fp32. In
bf16 a close choice may fall otherwise, and what follows it with it: `same codes` is the share of positions with plain
fp32's code. Only the transformer and the quantizer are timed, not the decoder, which is the same for both.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.generation import sampling
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer.quantizer import MultiScaleQuantizer


@dataclass
class Options:
    """Prints one table; ratios are taken within a run."""

    depth: int = 16
    """Depth of the VAR model."""
    images: int = 8
    """In a batch."""
    repeats: int = 2
    """Timed rounds; every contender runs once a round."""
    threads: int = 2
    """CPU threads."""
    cfg: float = 1.5
    """Guidance; 0 runs half as many rows."""
    json: Path | None = None
    """File for the figures."""


class Recorder(MultiScaleQuantizer):
    """The quantizer, which also notes the codes' rows that it was given."""

    seen: list[Tensor]

    def add_codes(self, f_hat_BCHW: Tensor, codes_BlC: Tensor, scale_index: int) -> Tensor:
        self.seen.append(codes_BlC.float())
        return super().add_codes(f_hat_BCHW, codes_BlC, scale_index)


class OnlyQuantizer:
    """What `sample` needs of a tokenizer, with the decoder left out."""

    def __init__(self, config: TokenizerConfig, quantizer: Recorder):
        self.config, self.quantizer = config, quantizer

    def to(self, device: object) -> OnlyQuantizer:
        return self

    def decode_f_hat(self, f_hat_BChw: Tensor) -> Tensor:
        return f_hat_BChw[:, :3]


@torch.no_grad()
def plain(model: NextScaleTransformer, quantizer: Recorder, labels_B: Tensor, cfg: float) -> None:
    """VAR's `autoregressive_infer_cfg`, written with our modules' weights, nothing cached but keys and values."""
    B, C, H = len(labels_B), model.config.C, model.config.H
    null = torch.full_like(labels_B, model.config.num_classes)
    condition = model.class_embed(torch.cat([labels_B, null]))
    where = model.scale_embed(model.schedule.scale_index_L()) + model.position_embed
    x = condition[:, None] + model.start_embed + where[:, :1]
    f_hat = quantizer.empty_f_hat(B)
    generator = torch.Generator().manual_seed(0)
    keys: list[Tensor | None] = [None] * len(model.blocks)
    values: list[Tensor | None] = [None] * len(model.blocks)
    for scale in range(model.schedule.num_scales):
        block: Any
        for number, block in enumerate(model.blocks):
            modulation = block.adaln(F.silu(condition)).view(-1, 1, 6, C)
            gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
            h = F.layer_norm(x, (C,), eps=1e-6).mul(scale1.add(1)).add(shift1)
            attention = block.attention
            bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
            qkv = F.linear(h, attention.qkv.weight, bias).view(2 * B, -1, 3, H, C // H)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            q = F.normalize(q, dim=-1).mul(attention.log_temperature.clamp_max(4.605170186).exp())
            k = F.normalize(k, dim=-1)
            previous_k, previous_v = keys[number], values[number]
            if previous_k is not None and previous_v is not None:
                k, v = torch.cat([previous_k, k], dim=2), torch.cat([previous_v, v], dim=2)
            keys[number], values[number] = k, v
            out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), scale=1.0)
            x = x + attention.proj(out.transpose(1, 2).reshape(2 * B, -1, C)).mul(gamma1)
            h = F.layer_norm(x, (C,), eps=1e-6).mul(scale2.add(1)).add(shift2)
            fc1, fc2 = block.ffn.fc1, block.ffn.fc2
            hidden = F.gelu(F.linear(h, fc1.weight, fc1.bias), approximate="tanh")
            x = x + F.linear(hidden, fc2.weight, fc2.bias).mul(gamma2)
        final_scale, final_shift = model.head_adaln(F.silu(condition)).view(-1, 1, 2, C).unbind(2)
        logits = model.head(F.layer_norm(x.float(), (C,), eps=1e-6).mul(final_scale.add(1)).add(final_shift)).float()
        t = cfg * scale / (model.schedule.num_scales - 1)
        codes = var_draw((1 + t) * logits[:B] - t * logits[B:], generator)
        f_hat = quantizer.add_scale(f_hat, codes, scale)
        if scale + 1 < model.schedule.num_scales:
            start, end = model.schedule.bounds[scale + 1]
            x = (model.word_embed(quantizer.next_input(f_hat, scale)) + where[:, start:end]).repeat(2, 1, 1)


def var_draw(logits_BlV: Tensor, generator: torch.Generator, top_k: int = 1, top_p: float = 0.96) -> Tensor:
    """VAR's `sample_with_top_k_top_p_`."""
    smallest = logits_BlV.topk(top_k, largest=True, sorted=False, dim=-1)[0].amin(dim=-1, keepdim=True)
    logits_BlV = logits_BlV.masked_fill(logits_BlV < smallest, -torch.inf)
    ascending, order = logits_BlV.sort(dim=-1, descending=False)
    remove = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    remove[..., -1:] = False
    logits_BlV = logits_BlV.masked_fill(remove.scatter(-1, order, remove), -torch.inf)
    drawn = torch.multinomial(logits_BlV.softmax(-1).flatten(0, 1), 1, generator=generator)
    return drawn.view(logits_BlV.shape[:2])


def same_codes(first: list[Tensor], second: list[Tensor]) -> float:
    """Share of positions with the same code (codes are compared by their rows)."""
    equal = torch.cat([(a - b).abs().amax(-1).lt(1e-3).flatten() for a, b in zip(first, second, strict=True)])
    return equal.float().mean().item()


def lively_model(depth: int) -> NextScaleTransformer:
    """Gates and head have the size of a trained model's, so that the codes depend on every block."""
    model = NextScaleTransformer.from_preset(f"var-d{depth}").eval()
    with torch.no_grad():
        block: Any
        for block in model.blocks:
            block.adaln.weight[: 2 * model.config.C] *= 300
        model.head.weight *= 50
    return model


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    model = lively_model(options.depth)
    half = NextScaleTransformer(model.config).to(torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    config = TokenizerConfig()
    torch.manual_seed(0)
    quantizer = Recorder(config).requires_grad_(False)
    labels_B = torch.arange(options.images) * 37 % 1000
    tokenizer = OnlyQuantizer(config, quantizer)

    def ours(which: NextScaleTransformer) -> Callable[[], object]:
        return lambda: sampling.sample(which, tokenizer, labels_B, cfg=options.cfg, top_k=1)  # type: ignore[arg-type]

    def autocast(function: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                function()

        return run

    contenders = {
        "plain fp32": lambda: plain(model, quantizer, labels_B, options.cfg),
        "ours fp32": ours(model),
        "plain bf16": autocast(lambda: plain(model, quantizer, labels_B, options.cfg)),
        "ours bf16": ours(half),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    codes: dict[str, list[Tensor]] = {}
    for _ in range(options.repeats):
        for name, run in contenders.items():
            quantizer.seen = []
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
            codes[name] = quantizer.seen
    seconds = {name: statistics.median(values) for name, values in times.items()}
    report = {
        "model": f"var-d{options.depth}",
        "images": options.images,
        "threads": options.threads,
        "torch": torch.__version__,
        "seconds": seconds,
        "fp32: plain / ours": seconds["plain fp32"] / seconds["ours fp32"],
        "bf16: plain / ours": seconds["plain bf16"] / seconds["ours bf16"],
        "ours bf16 against plain fp32": seconds["plain fp32"] / seconds["ours bf16"],
        **{f"same codes {name}": same_codes(codes["plain fp32"], codes[name]) for name in list(contenders)[1:]},
    }
    for name, value in seconds.items():
        print(f"{name:<12} {value:7.2f} s   {options.images / value:6.3f} images/s")
    ratios = ("fp32: plain / ours", "bf16: plain / ours", "ours bf16 against plain fp32")
    for name in (*ratios, *(f"same codes {contender}" for contender in list(contenders)[1:])):
        print(f"{name:<30} {report[name]:.3f}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
