"""The two recipes of a project as YAML, with the reason of each choice as a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

import yaml

from mepa_ds.config.yaml12 import Dumper
from mepa_ds.project.choosing.choices import Choices, Size
from mepa_ds.project.layout import Layout
from mepa_ds.project.looking.facts import ImageFacts

_WIDTH = 116
_HEADING = (
    "Written by `mepa init` for {source}. Every key is explained by `mepa {command} --help`; docs/own_images.md says "
    "how the values were chosen. Paths are relative to this file's folder: start the commands there."
)


def tokenizer_recipe(chosen: Choices, images: ImageFacts, layout: Layout) -> str:
    """Of a tokenizer that is trained (not `chosen.is_published`)."""
    assert chosen.multipliers is not None
    rate = _number(2e-3 * 256 / chosen.tokenizer_batch)
    half = max(chosen.tokenizer_steps // 2, 1)
    lines = [
        *_comment(_HEADING.format(source=images.source, command="train-tokenizer")),
        f"output_dir: {_word(layout.runs / 'tokenizer')}",
        "seed: 0",
        "",
        "data:",
        f"  images: {_word(layout.train(images))}",
        *([f"  heldout_images: {_word(layout.heldout(images))}"] if chosen.heldout != "none" else []),
        "  num_workers: 0",
        "",
        "tokenizer:",
        *_comment(chosen.why["scales"], 2),
        f"  scales: {list(chosen.scales)}",
        *_comment(chosen.why["codebook"], 2),
        f"  codebook_size: {chosen.codebook_size}",
        f"  code_width: {chosen.code_width}",
        "  channels: 32",
        f"  channel_multipliers: {list(chosen.multipliers)}  # {chosen.side} -> {chosen.scales[-1]} cells a side",
        "  num_res_blocks: 1",
        "  num_phi: 4",
        "",
        "codebook:",
        "  usage_decay: 0.9",
        "  revive_below: 0.1  # with this decay a code without tokens is dead after 22 steps",
        "  revive_every: 50",
        "",
        "optim:",
        f"  base_lr: {rate}  # at a batch of 256, so 2e-3 here",
        "  final_lr: 0.02",
        "",
        "train:",
        f"  steps: {chosen.tokenizer_steps}",
        f"  global_batch: {chosen.tokenizer_batch}",
        "",
        "log:",
        "  every: 25",
        f"  evaluate_every: {half}",
        f"  checkpoint_every: {half}",
    ]
    return "\n".join(lines) + "\n"


def pretrain_recipe(chosen: Choices, images: ImageFacts, layout: Layout) -> str:
    """Of the model."""
    guided = chosen.teacher != "none"
    sections = [
        [
            *_comment(_HEADING.format(source=images.source, command="pretrain")),
            f"output_dir: {_word(layout.pretrain)}",
            "seed: 0",
            f"tokenizer: {_word(layout.tokenizer(chosen))}",
        ],
        [
            "data:",
            f"  tokens: {_word(layout.tokens('train', chosen))}",
            *([f"  features: {_word(layout.features(chosen))}"] if guided else []),
            *([f"  heldout_tokens: {_word(layout.tokens('heldout', chosen))}"] if chosen.heldout != "none" else []),
            f"  num_workers: {4 if chosen.is_published else 0}",
        ],
        _model(chosen, len(images.classes)),
        ["objective:", *_alignment(chosen), *([] if chosen.is_published else ["  balance_weight: 0.01"])],
        _optim(chosen),
        [
            "train:",
            f"  global_batch: {chosen.batch}",
            *([f"  accumulation: {chosen.accumulation}"] if chosen.accumulation > 1 else []),
            *_comment(chosen.why["steps"], 2),
            f"  steps: {chosen.steps}" if chosen.steps is not None else f"  epochs: {chosen.epochs}",
        ],
        ["parallel:", f"  ep_size: {chosen.ep_size}", f"  precision: {chosen.precision}"],
        [
            "log:",
            f"  every: {chosen.log_every}",
            f"  evaluate_every: {chosen.evaluate_every}",
            f"  checkpoint_every: {chosen.checkpoint_every}",
            *([f"  sample_every: {chosen.sample_every}  # pictures in samples/"] if chosen.sample_every else []),
        ],
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _model(chosen: Choices, num_classes: int) -> list[str]:
    lines = ["model:", *_comment(chosen.why["size"], 2)] if "size" in chosen.why else ["model:"]
    if chosen.preset is not None:
        lines.append(f"  preset: {chosen.preset}")
        if num_classes != 1000:
            lines.append(f"  num_classes: {num_classes}")
        return lines if chosen.side == 256 else [*lines, f"  scales: {list(chosen.scales)}"]
    assert isinstance(chosen.size, Size)
    return [
        *lines,
        f"  depth: {chosen.size.depth}",
        f"  width: {chosen.size.width}",
        f"  num_heads: {chosen.size.num_heads}",
        f"  num_classes: {num_classes}",
        f"  scales: {list(chosen.scales)}",
        f"  codebook_size: {chosen.codebook_size}",
        f"  code_width: {chosen.code_width}",
        *(
            ["  drop_path: 0.0", "  head_init: 0.5  # VAR's 0.02 costs so short a run many steps"]
            if chosen.is_short
            else ["  drop_path: 0.1  # images repeat"]
        ),
        "  moe:",
        "    router: stmoe",
        "    num_experts: 8",
        "    top_k: 2",
        "    shared_expert: true",
        "    expert_ratio: 1.0",
    ]


def _alignment(chosen: Choices) -> list[str]:
    if chosen.teacher == "none":
        return ["  alignment: null  # no teacher"]
    return [
        *_comment(chosen.why["guidance"], 2),
        "  alignment:",
        "    weight: 0.5",
        *([] if chosen.guidance_until is None else [f"    until: {chosen.guidance_until:g}"]),
        f"    scales: {list(chosen.guidance_scales)}",
        *([] if chosen.is_published else ["    projector_hidden: 256"]),
    ]


def _optim(chosen: Choices) -> list[str]:
    here = "" if chosen.is_published else f"  # at a batch of 256, so {chosen.base_lr * chosen.batch / 256:.2g} here"
    short = ["  warmup_steps: 20", "  final_lr: 0.02"] if chosen.is_short else []
    return ["optim:", f"  base_lr: {_number(chosen.base_lr)}{here}", "  schedule: lin0", *short]


def _comment(text: str, indent: int = 0) -> Iterator[str]:
    prefix = " " * indent + "# "
    yield from textwrap.wrap(text, _WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False)


def _number(value: float) -> str:
    """With a point and an exponent, which every YAML reads as a number."""
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}{'' if '.' in f'{float(mantissa):g}' else '.0'}e{int(exponent):+03d}"


def _word(path: Path) -> str:
    """As YAML writes a text, in quotes where it needs them."""
    return yaml.dump(str(path), Dumper=Dumper, width=10_000, allow_unicode=True).removesuffix("\n...\n").strip()
