"""`mepa scale family`: a family of models in numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import tyro

from mepa_ds import log
from mepa_ds.cli.scale.moe_option import DENSE, MoEText, moe_of
from mepa_ds.command_line.scales import Scales
from mepa_ds.errors import UserError
from mepa_ds.scaling.family import VAR_DEPTHS, family_row, format_family, member
from mepa_ds.scaling.sizes import VAR_HEAD_WIDTH


@dataclass
class FamilyOptions:
    """Parameters by kind (total, active, of matrices, AdaLN, embeddings, experts), FLOPs of an image by part, and the
    memory that weights, gradients and optimizer take on a rank."""

    sizes: tuple[str, ...] = tuple(f"d{depth}" for depth in VAR_DEPTHS)
    """d16 is VAR's (C = 1024); d16w768 has another width, d16w768h12 another number of heads too."""
    moe: tuple[MoEText, ...] = (DENSE,)
    """dense, or experts as num_experts=8,top_k=2,expert_ratio=4,shared_expert=true; several give a table each."""
    head_width: int = VAR_HEAD_WIDTH
    """Width of a head, for sizes that give a width and no heads."""
    scales: Scales = None
    """Sides of the token maps [default: VAR's for 256 px]."""
    codebook_size: int = 4096
    """V of the tokenizer."""
    num_classes: int = 1000
    """Classes of the data set."""
    ranks: int = 1
    """Ranks over which ZeRO shares gradients and optimizer state."""
    json: bool = False
    """For programs: one object a model, FLOPs and bytes by part."""


def main(argv: list[str]) -> None:
    options = tyro.cli(FamilyOptions, prog="mepa scale family", args=argv)
    if options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: expected at least 1")
    if not options.sizes or not options.moe:
        raise UserError("--sizes and --moe need at least one value each")
    settings: dict[str, Any] = {"codebook_size": options.codebook_size, "num_classes": options.num_classes}
    if options.scales is not None:
        settings["scales"] = list(options.scales)
    rows = []
    for text in options.moe:
        moe, suffix = moe_of(text), "" if text == DENSE else f" {text}"
        for size in options.sizes:
            model = member(size, moe, options.head_width, settings)
            rows.append(family_row(size + suffix, model, options.ranks))
    log.say(json.dumps(rows, indent=1) if options.json else format_family(rows))
