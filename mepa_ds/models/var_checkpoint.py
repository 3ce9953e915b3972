"""VAR's transformer checkpoints (`var_d16.pth` ... `var_d36.pth`): the key table and the sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mepa_ds.config.base import validate
from mepa_ds.config.model import SCALES_256, SCALES_512, ModelConfig
from mepa_ds.config.tokenizer import checked_sides
from mepa_ds.errors import UserError
from mepa_ds.scales import ScaleSchedule
from mepa_ds.weights import read_state_dict, size_in, with_match

# VAR's key -> ours; {n} is the block's number.
KEYS = {
    "word_embed.weight": "word_embed.weight",
    "word_embed.bias": "word_embed.bias",
    "class_emb.weight": "class_embed.weight",
    "pos_start": "start_embed",
    "pos_1LC": "position_embed",
    "lvl_embed.weight": "scale_embed.weight",
    "shared_ada_lin.1.weight": "shared_adaln.weight",
    "shared_ada_lin.1.bias": "shared_adaln.bias",
    "blocks.{n}.attn.mat_qkv.weight": "blocks.{n}.attention.qkv.weight",
    "blocks.{n}.attn.q_bias": "blocks.{n}.attention.q_bias",
    "blocks.{n}.attn.v_bias": "blocks.{n}.attention.v_bias",
    "blocks.{n}.attn.scale_mul_1H11": "blocks.{n}.attention.log_temperature",
    "blocks.{n}.attn.proj.weight": "blocks.{n}.attention.proj.weight",
    "blocks.{n}.attn.proj.bias": "blocks.{n}.attention.proj.bias",
    "blocks.{n}.ffn.fc1.weight": "blocks.{n}.ffn.fc1.weight",
    "blocks.{n}.ffn.fc1.bias": "blocks.{n}.ffn.fc1.bias",
    "blocks.{n}.ffn.fc2.weight": "blocks.{n}.ffn.fc2.weight",
    "blocks.{n}.ffn.fc2.bias": "blocks.{n}.ffn.fc2.bias",
    "blocks.{n}.ada_lin.1.weight": "blocks.{n}.adaln.weight",
    "blocks.{n}.ada_lin.1.bias": "blocks.{n}.adaln.bias",
    "blocks.{n}.ada_gss": "blocks.{n}.adaln_offset",
    "head_nm.ada_lin.1.weight": "head_adaln.weight",
    "head_nm.ada_lin.1.bias": "head_adaln.bias",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
}
# Constants that VAR stores: the scale of each position, the mask, and a k bias that is always zero.
IGNORED = {"lvl_1L", "attn_bias_for_masking", "blocks.{n}.attn.zero_k_bias"}


# Behind a name that would otherwise be taken for ours.
OUTSIDE = " (not in VAR's layout)"


def convert_var(
    weights: Path | str | Mapping[str, Tensor], scales: Sequence[int] | None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """VAR's state dict -> our config and state dict. Unknown keys stay as they are: strict loading names them.

    Raises UserError for a state dict that is not VAR's or lacks whole blocks, or whose sizes contradict each other.
    """
    source = read_state_dict(weights)
    state = {_our_name(key): tensor for key, tensor in source.items() if _pattern(key) not in IGNORED}
    return _infer_config(source, scales, name_of(weights)), state


def name_in_var(name: str) -> str:
    """Our name of a parameter -> VAR's."""
    return _renamed(name, _NAMES)


def name_of(weights: Path | str | Mapping[str, Tensor]) -> str:
    """What messages call the weights."""
    return "the state dict" if isinstance(weights, Mapping) else str(weights)


_NAMES = {ours: theirs for theirs, ours in KEYS.items()}


def _our_name(key: str) -> str:
    foreign = _pattern(key) not in KEYS and _pattern(key) in _NAMES
    return key + OUTSIDE if foreign else _renamed(key, KEYS)


def _renamed(key: str, table: Mapping[str, str]) -> str:
    pattern = _pattern(key)
    number = key.split(".")[1] if pattern != key else ""
    return table.get(pattern, key).replace("{n}", number)


def _pattern(key: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "blocks.{n}.", key)


def _infer_config(state: Mapping[str, Tensor], scales: Sequence[int] | None, where: str) -> ModelConfig:
    """Sizes by VAR's names and shapes; each is read in several places, see `size_in`."""
    needed = ("head.weight", "class_emb.weight", "word_embed.weight", "pos_1LC", "blocks.0.ffn.fc1.weight")
    if missing := [with_match(key, list(state)) for key in needed if key not in state]:
        raise UserError(f"{where}: not a VAR transformer's state dict; without {', '.join(missing)}")

    def size(*places: tuple[str, int, int]) -> int:
        return size_in(state, places, where)

    C = size(
        ("head.weight", 2, 1), ("word_embed.weight", 2, 0), ("class_emb.weight", 2, 1), ("pos_1LC", 3, 2),
        ("blocks.0.ffn.fc1.weight", 2, 1),
    )  # fmt: skip
    numbers = {int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    # VAR's depth is its number of heads, each of width 64: a file cut short is not a shallower model.
    depth = max(1, C // 64)
    if lost := [str(number) for number in range(depth) if number not in numbers]:
        raise UserError(
            f"{where}: the weights do not fit the model; without block {', '.join(lost)}: a VAR transformer of width "
            f"{C} has {depth} blocks. Download or copy the file again"
        )
    temperatures = [(key, 4, 1) for key in state if key.endswith(".attn.scale_mul_1H11")]
    return validate(
        ModelConfig,
        {
            "depth": depth,
            "width": C,
            "num_heads": size(*temperatures) if temperatures else depth,
            "ffn_ratio": size(("blocks.0.ffn.fc1.bias", 1, 0), ("blocks.0.ffn.fc1.weight", 2, 0)) / C,
            "num_classes": size(("class_emb.weight", 2, 0)) - 1,
            "scales": _find_scales(size(("pos_1LC", 3, 1), ("lvl_1L", 2, 1)), scales, where),
            "codebook_size": size(("head.bias", 1, 0), ("head.weight", 2, 0)),
            "code_width": size(("word_embed.weight", 2, 1)),
            "shared_adaln": any(key.startswith("shared_ada_lin.") for key in state),
            "qk_norm": bool(temperatures),
        },
        where,
    )


def _find_scales(num_tokens: int, scales: Sequence[int] | None, where: str) -> list[int]:
    candidates = [list(SCALES_256), list(SCALES_512)] if scales is None else [checked_sides(scales, where)]
    for candidate in candidates:
        if ScaleSchedule.of(candidate).num_tokens == num_tokens:
            return candidate
    sides = math.isqrt(num_tokens)
    raise UserError(
        f"scales: the weights hold {num_tokens} positions, but {candidates} make "
        f"{[ScaleSchedule.of(c).num_tokens for c in candidates]}; give the schedule the weights were trained with "
        f"(its last side is below {sides + 1})"
    )
