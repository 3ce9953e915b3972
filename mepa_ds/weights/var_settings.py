"""Settings that VAR's programs store beside weights: its training's `args` and `config`, its classes' config.json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from mepa_ds.config.model import SCALES_256, SCALES_512
from mepa_ds.weights.state_dict_files import CONFIG_NAME, read_json

# What VAR's `--pn` takes beside 1_2_3_4.
_NAMED = {"256": SCALES_256, "512": SCALES_512, "1024": (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)}
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
