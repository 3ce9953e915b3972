"""`mepa upcycle`: a mixture-of-experts model from a dense one's weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.command_line.scales import Scales
from mepa_ds.config.base import validate
from mepa_ds.config.model import MoEConfig


@dataclass
class UpcycleOptions:
    """Every FFN becomes experts: copies of it, or slices where experts are narrower. The router is new.

    With copies the new model gives the dense model's output to rounding. With slices it does so if top_k of them (and
    the shared expert) cover the FFN and top_k divides num_experts. Start training from the result with `pretrain.py
    RECIPE init_weights=OUT`; the recipe's model.moe must be the same.
    """

    weights: Path
    """A dense model: a directory of safetensors + config.json, or VAR's var_d16.pth."""
    out: Path
    """Directory of the new model."""
    scales: Scales = None
    """Sides of the token maps, such as 1 2 3 4, if VAR weights do not tell them and they are not VAR's own."""
    num_heads: int | None = None
    """Number of attention heads, if VAR weights do not tell it (those without QK normalisation)."""
    depth: int | None = None
    """Number of blocks, if VAR weights do not tell it and it is not width / 64."""
    num_experts: int = 8
    """Routed experts."""
    top_k: int = 2
    """Routed experts that each token sees."""
    expert_ratio: float = 4.0
    """Hidden width of an expert as a multiple of C: 4 copies VAR's FFN, 1.333 makes iso-FLOP slices of it."""
    renormalize: bool = False
    """Divide the chosen experts' probabilities by their sum."""
    every: int = 1
    """Every n-th block becomes MoE, the others keep their FFN."""
    shared_expert: bool = True
    """One more expert that sees every token."""
    router: Literal["stmoe", "smoe", "token"] = "stmoe"
    """See model.moe.router of `pretrain.py --help`."""
    seed: int = 0
    """Seed of the new router's weights."""


def main(argv: list[str]) -> None:
    options = tyro.cli(UpcycleOptions, prog="mepa upcycle", args=argv)
    log.make_stdout_a_log()
    from mepa_ds.files import check_writable
    from mepa_ds.models.summary import count_parameters
    from mepa_ds.models.transformer import NextScaleTransformer
    from mepa_ds.models.upcycling import upcycle

    moe = validate(
        MoEConfig,
        {
            "router": options.router,
            "num_experts": options.num_experts,
            "top_k": options.top_k,
            "expert_ratio": options.expert_ratio,
            "renormalize": options.renormalize,
            "every": options.every,
            "shared_expert": options.shared_expert,
        },
        "options",
    )
    dense = NextScaleTransformer.open(options.weights, options.scales, num_heads=options.num_heads, depth=options.depth)
    check_writable(options.out, "--out")
    model = upcycle(dense, moe, options.seed)
    model.class_names = dense.class_names
    model.save_pretrained(options.out)
    log.say(f"{options.out}: {count_parameters(model.config)} (from {count_parameters(dense.config)})")


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
