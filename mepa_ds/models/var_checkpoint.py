"""VAR's transformer checkpoints (`var_d16.pth` ... `var_d36.pth`): the key table and the sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mepa_ds.config.base import validate
from mepa_ds.config.model import SCALES_256, SCALES_512, ModelConfig
from mepa_ds.errors import UserError
from mepa_ds.scales import ScaleSchedule
from mepa_ds.weights import read_state_dict

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


def convert_var(
    weights: Path | str | Mapping[str, Tensor], scales: Sequence[int] | None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """VAR's state dict -> our config and state dict. Unknown keys stay as they are: strict loading names them."""
    source = read_state_dict(weights)
    state = {}
    for key, tensor in source.items():
        pattern = re.sub(r"^blocks\.\d+\.", "blocks.{n}.", key)
        if pattern in IGNORED:
            continue
        number = key.split(".")[1] if pattern != key else ""
        state[KEYS.get(pattern, key).replace("{n}", number)] = tensor
    return _infer_config(state, scales), state


def _infer_config(state: Mapping[str, Tensor], scales: Sequence[int] | None) -> ModelConfig:
    needed = ["head.weight", "class_embed.weight", "word_embed.weight", "position_embed", "blocks.0.ffn.fc1.weight"]
    missing = [key for key in needed if key not in state]
    if missing:
        theirs = {ours: var for var, ours in KEYS.items()}
        names = ", ".join(theirs.get(key, key.replace("blocks.0.", "blocks.0.")) for key in missing)
        raise UserError(f"VAR weights: not a VAR transformer's state dict; without {names}")
    V, C = state["head.weight"].shape
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    temperature = state.get("blocks.0.attention.log_temperature")
    num_heads = temperature.shape[1] if temperature is not None else max(1, C // 64)
    return validate(
        ModelConfig,
        {
            "depth": depth,
            "width": C,
            "num_heads": num_heads,
            "ffn_ratio": state["blocks.0.ffn.fc1.weight"].shape[0] / C,
            "num_classes": state["class_embed.weight"].shape[0] - 1,
            "scales": list(_find_scales(state["position_embed"].shape[1], scales)),
            "codebook_size": V,
            "code_width": state["word_embed.weight"].shape[1],
            "shared_adaln": "shared_adaln.weight" in state,
            "qk_norm": temperature is not None,
        },
        "VAR weights",
    )


def _find_scales(num_tokens: int, scales: Sequence[int] | None) -> Sequence[int]:
    candidates = [scales] if scales is not None else [SCALES_256, SCALES_512]
    for candidate in candidates:
        if ScaleSchedule.of(candidate).num_tokens == num_tokens:
            return candidate
    sides = math.isqrt(num_tokens)
    raise UserError(
        f"scales: the weights hold {num_tokens} positions, but {[list(c) for c in candidates]} make "
        f"{[ScaleSchedule.of(c).num_tokens for c in candidates]}; give the schedule the weights were trained with "
        f"(its last side is below {sides + 1})"
    )
