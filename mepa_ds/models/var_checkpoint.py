"""VAR's transformer checkpoints (`var_d16.pth` ... `var_d36.pth`), and HMAR's: their keys under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mepa_ds import distributed
from mepa_ds.config.model import ModelConfig
from mepa_ds.weights.hmar_names import is_hmars, under_vars_names
from mepa_ds.weights.state_dict_files import read_checkpoint
from mepa_ds.weights.var_settings import is_markovian
from mepa_ds.weights.var_sizes import WANTED, GivenSizes, infer_config

# VAR's key -> our key; {n} is the number of the block.
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
# Constants in VAR's files: the scale of each position, the attention mask, and the bias of keys, which is always zero.
IGNORED = {"lvl_1L", "attn_bias_for_masking", "blocks.{n}.attn.zero_k_bias"}


# Marks a foreign key that happens to be a name of ours.
OUTSIDE = " (not in VAR's layout)"


def convert_var(weights: Path | str | Mapping[str, Tensor], given: GivenSizes) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Converts VAR's state dict to our config and state dict. Unknown keys are kept, and strict loading names them.

    Sizes that the file states (in its settings or buffers) take precedence over `given`; `check_given` compares them.

    Raises:
        UserError: the state dict is not VAR's, or lacks whole blocks; its sizes contradict each other; or a size is
            neither in the file nor given.
    """
    source, notes = read_checkpoint(weights, WANTED)
    where = name_of(weights)
    hmars = is_hmars(source)
    if hmars:
        source, left_out = under_vars_names(source)
        if left_out:
            distributed.note_once(
                f"{where}: HMAR's; its {len(left_out)} tensors of masked refinement (mask_blocks, mask_head, ...) are "
                "left out"
            )
    state = {_our_name(key): tensor for key, tensor in source.items() if _pattern(key) not in IGNORED}
    config = infer_config(source, notes, given, where)
    markovian = hmars or is_markovian(source.get("attn_bias_for_masking"), config.scales, where)
    return config.model_copy(update={"markovian": markovian}), state


def name_in_var(name: str) -> str:
    """Returns VAR's name for our name of a parameter."""
    return _renamed(name, _NAMES)


def name_of(weights: Path | str | Mapping[str, Tensor]) -> str:
    """Returns the name of the weights for messages."""
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
