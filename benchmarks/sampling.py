"""Sampling against a plain re-implementation of VAR's loop, on the same weights, in one run.

    python benchmarks/sampling.py --json sampling.json
    python benchmarks/sampling.py --images 1 8 64 --contenders "plain bf16" "ours bf16"        (on a GPU)

plain fp32    VAR's loop: conditional and unconditional rows through every block at every scale, AdaLN projected anew at
              each scale, keys and values concatenated scale by scale
plain bf16    the same under autocast, as VAR's demo runs it
ours fp32     mepa_ds.sample
ours bf16     mepa_ds.sample with the model in bf16
ours compiled the same with its blocks compiled, which takes a minute or so before the first round

Weights are random (VAR-d16's shapes); images are made with top_k = 1, so both must pick the same codes in fp32. In
bf16 a close choice may fall otherwise, and what follows it with it: `same codes` is the share of positions with plain
fp32's code. Only the transformer and the quantizer are timed, not the decoder, which is the same for both.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
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
from mepa_ds.machine import cpu_name
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer.quantizer import MultiScaleQuantizer

CONTENDERS = ("plain fp32", "ours fp32", "plain bf16", "ours bf16")
ALL = (*CONTENDERS, "ours compiled")
RATIOS = {
    "fp32: plain / ours": ("plain fp32", "ours fp32"),
    "bf16: plain / ours": ("plain bf16", "ours bf16"),
    "ours bf16 against plain fp32": ("plain fp32", "ours bf16"),
    "compiled: ours bf16 / ours compiled": ("ours bf16", "ours compiled"),
}


@dataclass
class Options:
    """Prints one table; ratios are taken within a run."""

    depth: int = 16
    """Depth of the VAR model."""
    images: tuple[int, ...] = (8,)
    """In a batch; each number is measured on its own."""
    contenders: tuple[str, ...] = CONTENDERS
    """What is measured; ratios and shares are of those that are there."""
    repeats: int = 2
    """Timed rounds; every contender runs once a round."""
    threads: int = 2
    """CPU threads."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda."""
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

    def __init__(self, quantizer: Recorder):
        self.config, self.quantizer = TokenizerConfig(), quantizer

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
    where = model.scale_embed(model.schedule.scale_index_L(labels_B.device)) + model.position_embed
    x = condition[:, None] + model.start_embed + where[:, :1]
    f_hat = quantizer.empty_f_hat(B)
    generator = torch.Generator(labels_B.device).manual_seed(0)
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


def runs(options: Options, model: NextScaleTransformer, quantizer: Recorder, labels_B: Tensor) -> dict[str, Any]:
    """A function for each contender, which makes one batch."""
    half = NextScaleTransformer(model.config).to(options.device, torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    tokenizer: Any = OnlyQuantizer(quantizer)

    def theirs() -> None:
        plain(model, quantizer, labels_B, options.cfg)

    def theirs_in_bf16() -> None:
        with torch.autocast(options.device, torch.bfloat16):
            theirs()

    return {
        "plain fp32": theirs,
        "ours fp32": lambda: sampling.sample(model, tokenizer, labels_B, cfg=options.cfg, top_k=1),
        "plain bf16": theirs_in_bf16,
        "ours bf16": lambda: sampling.sample(half, tokenizer, labels_B, cfg=options.cfg, top_k=1),
        "ours compiled": lambda: sampling.sample(half, tokenizer, labels_B, cfg=options.cfg, top_k=1, compiled=True),
    }


def one_batch(options: Options, model: NextScaleTransformer, quantizer: Recorder, images: int) -> dict[str, Any]:
    """Seconds of every contender for a batch of `images`, ratios of these, and shares of equal codes."""
    labels_B = (torch.arange(images) * 37 % 1000).to(options.device)
    every = runs(options, model, quantizer, labels_B)
    wait = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in options.contenders}
    codes: dict[str, list[Tensor]] = {}
    # A GPU is warmed up by a round that is not timed, and so is what has to be compiled.
    warm_up = int(options.device == "cuda" or "ours compiled" in options.contenders)
    for number in range(options.repeats + warm_up):
        for name in options.contenders:
            quantizer.seen = []
            wait()
            started = time.perf_counter()
            every[name]()
            wait()
            if number >= warm_up:
                times[name].append(time.perf_counter() - started)
            codes[name] = quantizer.seen
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        name: seconds[theirs] / seconds[ours]
        for name, (theirs, ours) in RATIOS.items()
        if theirs in seconds and ours in seconds
    }
    exact = codes.get("plain fp32")
    same = {f"same codes {name}": same_codes(exact, of_name) for name, of_name in codes.items() if exact is not None}
    same.pop("same codes plain fp32", None)
    speeds = {name: images / value for name, value in seconds.items()}
    return {"images": images, "seconds": seconds, "images_per_second": speeds, **ratios, **same}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if unknown := [name for name in options.contenders if name not in ALL]:
        raise SystemExit(f"--contenders: {', '.join(unknown)}: expected some of {', '.join(ALL)}")
    torch.set_num_threads(options.threads)
    model = lively_model(options.depth).to(options.device)
    torch.manual_seed(0)
    quantizer = Recorder(TokenizerConfig()).requires_grad_(False).to(options.device)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{cpu_name()}, {options.threads} threads"
    print(f"{machine}, torch {torch.__version__}, var-d{options.depth}", flush=True)
    batches = []
    for images in options.images:
        batch = one_batch(options, model, quantizer, images)
        batches.append(batch)
        for name, value in batch["seconds"].items():
            print(f"{images:>4} images  {name:<13} {value:8.3f} s   {images / value:8.3f} images/s", flush=True)
        for name in [*RATIOS, *(f"same codes {name}" for name in ALL)]:
            if name in batch:
                print(f"{images:>4} images  {name:<35} {batch[name]:.3f}", flush=True)
    if options.json:
        report = {
            "model": f"var-d{options.depth}",
            "device": machine,
            "threads": options.threads,
            "torch": torch.__version__,
            "batches": batches,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
