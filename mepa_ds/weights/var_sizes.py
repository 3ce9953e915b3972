"""The sizes of VAR's transformers, read from their tensors, the settings beside them, and what the caller says."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mepa_ds.config.base import validate
from mepa_ds.config.model import SCALES_256, SCALES_512, ModelConfig
from mepa_ds.config.tokenizer import checked_sides
from mepa_ds.errors import UserError
from mepa_ds.scales import ScaleSchedule
from mepa_ds.weights.directories import size_in, with_match
from mepa_ds.weights.kinds import but_another
from mepa_ds.weights.state_dicts import Wanted
from mepa_ds.weights.var_settings import schedule_in, setting_in, sides_in_buffer

WANTED = Wanted(
    "VAR's transformer",
    ("head.weight", "class_emb.weight", "word_embed.weight", "pos_1LC", "blocks.0.ffn.fc1.weight"),
)
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class GivenSizes:
    """What the caller says about sizes that no tensor shows. None: unknown, or as in VAR."""

    scales: Sequence[int] | None = None
    num_heads: int | None = None
    """The temperatures of QK normalisation show this number; without QK normalisation, no tensor does."""
    depth: int | None = None
    """The blocks in the file show this number if there are width / 64, as in VAR. Else the file may be incomplete."""
    or_vars_scales: bool = False
    """Where nothing tells: VAR's schedule of 256 or 512 px, if one has as many positions, before `scales`."""


def check_given(config: ModelConfig, given: GivenSizes, where: str) -> None:
    """Raises UserError if the caller gave other sizes than the weights have."""
    if given.scales is not None and checked_sides(given.scales, where) != list(config.scales):
        raise UserError(f"scales: {where} was trained with {list(config.scales)}, and has no other")
    for name, said, found in (("num_heads", given.num_heads, config.H), ("depth", given.depth, config.depth)):
        if said is not None and said != found:
            raise UserError(f"{name}: {where} was trained with {found}, and has no other; got {said}")


def infer_config(
    state: Mapping[str, Tensor], notes: Sequence[Mapping[str, Any]], given: GivenSizes, where: str
) -> ModelConfig:
    """Reads all sizes from VAR's names and shapes. Each size is read in several places (see `size_in`).

    Raises:
        UserError: the names are not VAR's; sizes contradict each other; a size is neither in the file nor given.
    """
    if missing := [with_match(key, list(state)) for key in WANTED.names if key not in state]:
        another = len(missing) > len(WANTED.names) / 2
        own = (
            "; these are weights of mepa_ds: NextScaleTransformer.open and all commands take their directory, with its "
            "config.json"
        )
        raise UserError(
            f"{where}: not a VAR transformer's state dict; without {', '.join(missing)}"
            + (own if "class_embed.weight" in state else but_another(state) if another else "")
        )

    def size(*places: tuple[str, int, int]) -> int:
        return size_in(state, places, where)

    C = size(
        ("head.weight", 2, 1), ("word_embed.weight", 2, 0), ("class_emb.weight", 2, 1), ("pos_1LC", 3, 2),
        ("blocks.0.ffn.fc1.weight", 2, 1),
    )  # fmt: skip
    _check_settings(notes, C, where)
    depth = _find_depth(state, notes, given, C, where)
    temperatures = [(key, 4, 1) for key in state if key.endswith(".attn.scale_mul_1H11")]
    num_tokens = size(("pos_1LC", 3, 1), ("lvl_1L", 2, 1))
    return validate(
        ModelConfig,
        {
            "depth": depth,
            "width": C,
            "num_heads": size(*temperatures) if temperatures else _find_heads(notes, given, C, where),
            "ffn_ratio": size(("blocks.0.ffn.fc1.bias", 1, 0), ("blocks.0.ffn.fc1.weight", 2, 0)) / C,
            "num_classes": size(("class_emb.weight", 2, 0)) - 1,
            "scales": _find_scales(state.get("lvl_1L"), num_tokens, notes, given, where),
            "codebook_size": size(("head.bias", 1, 0), ("head.weight", 2, 0)),
            "code_width": size(("word_embed.weight", 2, 1)),
            "shared_adaln": any(key.startswith("shared_ada_lin.") for key in state),
            "qk_norm": bool(temperatures),
        },
        where,
    )


def _check_settings(notes: Sequence[Mapping[str, Any]], C: int, where: str) -> None:
    """Raises UserError for settings that belong to other weights, or that this package does not implement."""
    if (width := setting_in(notes, "embed_dim", int)) not in (None, C):
        raise UserError(
            f"{where}: the weights are of width {C}, but the settings beside them (config.json) are of a model of "
            f"width {width}; put together what was saved together"
        )
    if (eps := setting_in(notes, "norm_eps", float)) not in (None, _NORM_EPS):
        raise UserError(f"{where}: trained with norm_eps {eps}; only VAR's {_NORM_EPS} can be computed here")


def _find_depth(
    state: Mapping[str, Tensor], notes: Sequence[Mapping[str, Any]], given: GivenSizes, C: int, where: str
) -> int:
    """Returns the number of blocks. It must be VAR's width / 64, unless settings or the caller say another number.

    Without this rule, an incomplete file would load as a shallower model.
    """
    numbers = {int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    there = next(number for number in range(len(numbers) + 1) if number not in numbers)
    usual = max(1, C // 64)
    known = setting_in(notes, "depth", int)
    if known is None and there != usual:
        known = given.depth
    depth = usual if known is None else known
    lost = [str(number) for number in range(depth) if number not in numbers]
    others = f"or say depth={there} (--depth {there}) if the model has no more" if there else ""
    if lost and known is None:
        raise UserError(
            f"{where}: the weights do not fit the model; without block {', '.join(lost)}: a VAR transformer of width "
            f"{C} has {depth} blocks. Download or copy the file again" + (f", {others}" if others else "")
        )
    if lost:
        raise UserError(
            f"{where}: the weights do not fit the model; without block {', '.join(lost)} of a model of depth {depth}. "
            "Download or copy the file again"
        )
    if known is None and there > usual:
        raise UserError(
            f"{where}: depth: the weights have {there} blocks, but a VAR transformer of width {C} has {usual}; say "
            f"depth={there} (--depth {there}) if this one has them all"
        )
    return depth


def _find_heads(notes: Sequence[Mapping[str, Any]], given: GivenSizes, C: int, where: str) -> int:
    heads = setting_in(notes, "num_heads", int)
    if heads is None and setting_in(notes, "pn", str) is not None and setting_in(notes, "depth", int) == C // 64:
        heads = C // 64  # as VAR's own training sets it for all its models
    heads = given.num_heads if heads is None else heads
    if heads is None:
        usual = max(1, C // 64)
        raise UserError(
            f"{where}: num_heads: weights without QK normalisation do not show it; say num_heads={usual} (--num-heads "
            f"{usual}; model.num_heads in a recipe) if each is {C // usual} wide, as VAR's are, or what else it is"
        )
    return heads


def _find_scales(
    scale_of_position_1L: Tensor | None,
    num_tokens: int,
    notes: Sequence[Mapping[str, Any]],
    given: GivenSizes,
    where: str,
) -> list[int]:
    known = sides_in_buffer(scale_of_position_1L) or schedule_in(notes)
    candidates = [list(SCALES_256), list(SCALES_512)] if known is None else [known]
    if given.scales is not None and (known is None or ScaleSchedule.of(known).num_tokens != num_tokens):
        candidates = [*(candidates if given.or_vars_scales else []), checked_sides(given.scales, where)]
    for candidate in candidates:
        if ScaleSchedule.of(candidate).num_tokens == num_tokens:
            return candidate
    sides = math.isqrt(num_tokens)
    raise UserError(
        f"{where}: scales: the weights hold {num_tokens} positions, but {candidates} make "
        f"{[ScaleSchedule.of(c).num_tokens for c in candidates]}; give the schedule the weights were trained with, "
        f"such as scales=(1, 2, 3) or --scales 1 2 3 (its last side is below {sides + 1}; model.scales in a recipe. "
        "Where the recipe has another one: NextScaleTransformer.open(FILE, SCALES).save_pretrained(DIRECTORY), and "
        "init_weights=DIRECTORY)"
    )
