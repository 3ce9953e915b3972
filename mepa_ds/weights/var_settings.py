"""Settings that VAR's programs store with weights: its training's `args` and `config`, its classes' config.json, and
the buffers of its networks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mepa_ds.config.model import SCALES_256, SCALES_512
from mepa_ds.errors import UserError
from mepa_ds.scales import ScaleSchedule
from mepa_ds.weights.state_dict_files import CONFIG_NAME, read_json

# What VAR's `--pn` takes beside 1_2_3_4.
_NAMED = {"256": SCALES_256, "512": SCALES_512, "1024": (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)}
_HIDDEN = -1e4
"""Of attention's logits: what programs write in place of minus infinity is at most this."""
T = TypeVar("T")


def kind_of_vars(directory: Path) -> Literal["transformer", "tokenizer"] | None:
    """Which network a directory holds that one of VAR's classes wrote (by huggingface_hub's `save_pretrained`).

    Its config.json has the arguments of a constructor, VARHF's or VQVAE's. None: there is no such file, or another's.
    """
    path = directory / CONFIG_NAME
    config = read_json(path) if path.is_file() else {}
    if "model_type" in config:
        return None
    if "patch_nums" in config or "embed_dim" in config:
        return "transformer"
    return "tokenizer" if "z_channels" in config or "v_patch_nums" in config else None


def setting_in(notes: Sequence[Mapping[str, Any]], key: str, kind: type[T]) -> T | None:
    """The value of that type under a key, in the nearest note that has one."""
    for note in _all(notes):
        value = note.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and kind is float:
            value = float(value)
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    return None


def schedule_in(notes: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """The sides of the token maps: `patch_nums`, `v_patch_nums`, or `pn` as on VAR's command line."""
    for note in _all(notes):
        for sides in (note.get("patch_nums"), note.get("v_patch_nums"), _sides_of(note.get("pn"))):
            if isinstance(sides, list | tuple) and sides and all(type(side) is int for side in sides):
                return list(sides)
    return None


def _all(notes: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The notes, and in each the arguments of the tokenizer's constructor."""
    for note in notes:
        yield note
        if isinstance(inner := note.get("vae_kwargs"), Mapping):
            yield inner


def _sides_of(pn: Any) -> Sequence[int] | None:
    if not isinstance(pn, str):
        return None
    return _NAMED.get(pn) or (
        list(map(int, re.split("[_-]", pn))) if re.fullmatch(r"\d{1,6}([_-]\d{1,6}){,99}", pn) else None
    )


def sides_in_buffer(scale_of_position_1L: Tensor | None) -> list[int] | None:
    """Reads the schedule from VAR's buffer `lvl_1L`, the scale of each position (1, L). None: it holds no schedule."""
    if scale_of_position_1L is None or scale_of_position_1L.is_floating_point() or not scale_of_position_1L.numel():
        return None
    positions_L = scale_of_position_1L.flatten()
    numbers, lengths = positions_L.unique_consecutive(return_counts=True)
    sides = [math.isqrt(length) for length in lengths.tolist()]
    whole = [side * side for side in sides] == lengths.tolist() and numbers.equal(torch.arange(len(sides)).to(numbers))
    growing = sides == sorted(set(sides))
    return sides if whole and growing else None


def is_markovian(mask_11LL: Tensor | None, sides: Sequence[int], where: str) -> bool:
    """Whether VAR's buffer `attn_bias_for_masking` lets a scale attend to itself alone, as HMAR's does.

    A buffer that holds no mask for this schedule, or none at all, is VAR's.

    Raises:
        UserError: the mask is neither VAR's nor HMAR's.
    """
    schedule = ScaleSchedule.of(sides)
    if len(sides) == 1 or mask_11LL is None or mask_11LL.numel() != schedule.num_tokens**2:
        return False
    mask_LL = mask_11LL.reshape(schedule.num_tokens, schedule.num_tokens).cpu()  # a state dict in memory may be a GPU's
    if mask_LL.dtype == torch.bool:
        seen_LL = mask_LL == mask_LL[0, 0]  # true may mean either, but every position sees itself
    elif mask_LL.is_floating_point() and bool(((mask_LL == 0) | (mask_LL <= _HIDDEN)).all()):
        seen_LL = mask_LL == 0
    else:
        return False
    scale_L = schedule.scale_index_L(torch.device("cpu"))
    if torch.equal(seen_LL, scale_L[:, None] >= scale_L):
        return False
    if torch.equal(seen_LL, scale_L[:, None] == scale_L):
        return True
    raise UserError(
        f"{where}: trained with a mask of its own (attn_bias_for_masking): only those of VAR (a scale sees itself and "
        "all coarser ones) and of HMAR (itself alone) can be computed here"
    )
