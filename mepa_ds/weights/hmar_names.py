"""HMAR's networks (arXiv 2506.04421, NVlabs/HMAR) under VAR's names.

HMAR's pretraining stores VAR's names. Its published files hold the network after masked fine-tuning: the first blocks,
which both tasks share, and the last ones and the heads twice, for the next scale and for masked refinement. What
predicts the next scale is a VAR of Markovian attention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

_HEAD = "ns_head.weight"
_REFINEMENT = ("mask_blocks.", "mask_head.", "mask_head_nm.", "mask_embed.")
_BLOCK = re.compile(r"(base_blocks|ns_blocks)\.(\d+)\.")


def is_hmars(state: Mapping[str, object]) -> bool:
    return _HEAD in state


def under_vars_names(state: Mapping[str, T]) -> tuple[dict[str, T], list[str]]:
    """What predicts the next scale, under VAR's names, and the names of masked refinement, which are left out.

    What would take a name that the file has already keeps its own, which strict loading then finds unexpected.
    """
    shared = {int(match[2]) for name in state if (match := _BLOCK.match(name)) and match[1] == "base_blocks"}
    renamed, left_out = {}, []
    for name, value in state.items():
        if name.startswith(_REFINEMENT):
            left_out.append(name)
            continue
        own = name
        if match := _BLOCK.match(name):
            number = int(match[2]) + (len(shared) if match[1] == "ns_blocks" else 0)
            name = f"blocks.{number}.{name[match.end() :]}"
        name = name.removeprefix("ns_") if name != "word_embed_bias" else "word_embed.bias"
        renamed[own if name in state else name] = value
    return renamed, left_out
