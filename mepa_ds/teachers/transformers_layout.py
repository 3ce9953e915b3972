"""DINOv2 and DINOv3 as the transformers library stores them: the table of its names, and the authors' state dict again.

Its files have had the same names in every release. A state dict that was taken from a model of release 5 in memory has
other names for some modules, which are in the table too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.teachers.known_vits import DINOV2, DINOV2_REGISTERS, DINOV3, Facts
from mepa_ds.weights.directories import size_in, with_match
from mepa_ds.weights.state_dicts import MAX_NAMED, listed

WANTED_NAMES = (
    ("embeddings.cls_token", "encoder.layer.0.norm1.weight", "layernorm.weight"),
    ("embeddings.cls_token", "layer.0.norm1.weight", "norm.weight"),
)
"""Names that any state dict of DINOv2 has here, and names that any of DINOv3 has."""

_CLS, _MASK, _REGISTERS = "embeddings.cls_token", "embeddings.mask_token", "embeddings.register_tokens"
_POSITIONS = "embeddings.position_embeddings"

# The library's name of a module, which has a weight and a bias -> the authors'. `#1` is the second of the parts that
# the authors keep in one matrix. What begins with `.` is in every block.
_NORMS = {".norm1": ".norm1", ".norm2": ".norm2"}
_ATTENTION = {
    ".attention.q_proj": ".attn.qkv#0",
    ".attention.k_proj": ".attn.qkv#1",
    ".attention.v_proj": ".attn.qkv#2",
    ".attention.o_proj": ".attn.proj",
}
_ATTENTION_2 = {
    ".attention.attention.query": ".attn.qkv#0",
    ".attention.attention.key": ".attn.qkv#1",
    ".attention.attention.value": ".attn.qkv#2",
    ".attention.output.dense": ".attn.proj",
}
_MLP_2 = {".mlp.fc1": ".mlp.fc1", ".mlp.fc2": ".mlp.fc2"}
_GATED_2 = {".mlp.weights_in": ".mlp.w12", ".mlp.weights_out": ".mlp.w3"}
_GATED_2_IN_MEMORY = {".mlp.gate_proj": ".mlp.w12#0", ".mlp.up_proj": ".mlp.w12#1", ".mlp.down_proj": ".mlp.w3"}
_MLP_3 = {".mlp.up_proj": ".mlp.fc1", ".mlp.down_proj": ".mlp.fc2"}
_GATED_3 = {".mlp.gate_proj": ".mlp.w1", ".mlp.up_proj": ".mlp.w2", ".mlp.down_proj": ".mlp.w3"}
_STEM_2 = {"embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm": "norm"}
_STEM_3 = {"embeddings.patch_embeddings": "patch_embed.proj", "norm": "norm"}
# Parameters that are no module's weight or bias.
_TENSORS = {
    _CLS: "cls_token",
    _MASK: "mask_token",
    ".layer_scale1.lambda1": ".ls1.gamma",
    ".layer_scale2.lambda1": ".ls2.gamma",
}
_TENSORS_2 = {**_TENSORS, _POSITIONS: "pos_embed", _REGISTERS: "register_tokens"}
_TENSORS_3 = {**_TENSORS, _REGISTERS: "storage_tokens"}
_BIASES_3 = frozenset(f".attention.{part}_proj.bias" for part in "qkv")


class Layout(NamedTuple):
    """One of the ways to store one of the models."""

    blocks: str
    """What the name of a block begins with, before its number."""
    keys: dict[str, str]
    """The library's name of a tensor -> the authors'. What begins with `.` is in every block."""
    is_dinov3: bool

    @property
    def is_gated(self) -> bool:
        return ".mlp.fc1.weight" not in self.keys.values()

    def split(self, name: str) -> tuple[str, str]:
        """(number of the block or "", name within it)."""
        match = re.fullmatch(rf"{re.escape(self.blocks)}(0|[1-9]\d{{,2}})(\..+)", name)
        return (match[1], match[2]) if match else ("", name)

    def authors_name(self, name: str) -> str:
        number, inner = self.split(name)
        return f"blocks.{number}{self.keys[inner]}" if number else self.keys[name]


def _layout(blocks: str, tensors: Mapping[str, str], *modules: Mapping[str, str]) -> Layout:
    keys = dict(tensors)
    for theirs, ours in (pair for part in (_NORMS, *modules) for pair in part.items()):
        module, mark, part = ours.partition("#")
        keys |= {f"{theirs}.{leaf}": f"{module}.{leaf}{mark}{part}" for leaf in ("weight", "bias")}
    return Layout(blocks, keys, tensors is _TENSORS_3)


_LAYOUTS = (
    *(_layout("encoder.layer.", _TENSORS_2, _STEM_2, _ATTENTION_2, mlp) for mlp in (_MLP_2, _GATED_2)),
    *(_layout("encoder.layer.", _TENSORS_2, _STEM_2, _ATTENTION, mlp) for mlp in (_MLP_2, _GATED_2_IN_MEMORY)),
    *(
        _layout(blocks, _TENSORS_3, _STEM_3, _ATTENTION, mlp)
        for blocks in ("layer.", "model.layer.")  # the second in memory, of release 5
        for mlp in (_MLP_3, _GATED_3)
    ),
)


def is_theirs(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of the transformers library, of whichever model."""
    return any(".embeddings." in f".{name}" for name in state)


def layout_of(state: Mapping[str, Tensor], where: str) -> Layout:
    """The layout whose names these are.

    Raises:
        UserError: names are missing, or there are others; the message has the nearest of each.
    """
    found = [(*_wrong_names(state, layout), layout) for layout in _LAYOUTS]
    unexpected, missing, layout = min(found, key=lambda item: (len(item[0]), len(item[1])))
    problems = [
        f"{len(names)} {what}: "
        + listed([*(with_match(name, others) for name in names[:MAX_NAMED]), *names[MAX_NAMED:]])
        for what, names, others in (
            ("missing", missing, unexpected),
            ("unexpected", unexpected, missing or list(state.keys() - set(unexpected))),
        )
        if names
    ]
    if problems:
        known = DINOV3 if layout.is_dinov3 else DINOV2
        nearest = f"nearest is its {known}, but {'; '.join(problems)}"
        raise UserError(
            f"{where}: not the weights of a DINOv2 or DINOv3 of the transformers library, or not all of them; "
            + (f"it has none of their names, but {listed(unexpected)}" if len(unexpected) == len(state) else nearest)
            + ". Copy the file again; of another model, give timm's file, and timm's name of it as the teacher"
        )
    return layout


def facts_of_weights(state: Mapping[str, Tensor], layout: Layout, where: str) -> Facts:
    """What names and shapes tell. Raises UserError for a tensor that has not its dimensions."""
    stem = _STEM_3 if layout.is_dinov3 else _STEM_2
    patches, norm = (f"{name}.weight" for name in stem)
    has_registers = _REGISTERS in state
    first = f"{layout.blocks}0"
    last_layer = next(name for name, ours in layout.keys.items() if ours in (".mlp.fc2.weight", ".mlp.w3.weight"))
    facts = {
        "model_type": DINOV3 if layout.is_dinov3 else DINOV2_REGISTERS if has_registers else DINOV2,
        "hidden_size": size_in(state, [(_CLS, 3, 2), (norm, 1, 0)], where),
        "num_hidden_layers": _num_blocks(state, layout),
        "patch_size": size_in(state, [(patches, 4, 2)], where),
        "num_register_tokens": size_in(state, [(_REGISTERS, 3, 1)], where) if has_registers else 0,
        "gated MLP": layout.is_gated,
        "intermediate_size": size_in(state, [(first + last_layer, 2, 1)], where),
    }
    if not layout.is_dinov3:
        facts["position_embeddings"] = size_in(state, [(_POSITIONS, 3, 1)], where)
    return facts


def to_authors(state: dict[str, Tensor], layout: Layout, where: str) -> dict[str, Tensor]:
    """The authors' state dict of the same numbers. Empties `state`, so that large weights are there once.

    Raises:
        UserError: parts of a joint matrix have different shapes, or DINOv3's keys have a bias, which timm's model and
            the authors' lack.
    """
    authors: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name in list(state):
        whole, _, part = layout.authors_name(name).partition("#")
        if not part:
            authors[whole] = state.pop(name)
            continue
        if layout.is_dinov3 and name.endswith("k_proj.bias") and state[name].any():
            raise UserError(f"{where}: {name} is not zero, but keys have no bias in DINOv3; these are other weights")
        parts.setdefault(whole, {})[int(part)] = state.pop(name)
        if len(parts[whole]) == (3 if "qkv" in whole else 2):
            authors[whole] = _joined(parts.pop(whole), whole, where)
    for whole, pieces in parts.items():  # no bias of keys
        authors[whole] = _joined({1: torch.zeros_like(pieces[0]), **pieces}, whole, where)
    # timm knows the authors' DINOv2 by its mask token, which a model may be made without.
    authors.setdefault("mask_token", authors["cls_token"].new_zeros(authors["cls_token"].shape[1:]))
    return authors


def _joined(pieces: Mapping[int, Tensor], name: str, where: str) -> Tensor:
    ordered = [pieces[number] for number in sorted(pieces)]
    if len({(piece.shape, piece.dtype) for piece in ordered}) > 1 or not ordered[0].ndim:
        kinds = ", ".join(f"{tuple(piece.shape)} {str(piece.dtype).removeprefix('torch.')}" for piece in ordered)
        raise UserError(f"{where}: the parts of {name} must have one shape and type, but have {kinds}; copy it again")
    return torch.cat(ordered)


def _wrong_names(state: Mapping[str, Tensor], layout: Layout) -> tuple[list[str], list[str]]:
    """(names that are of no part of the model, names that are missing)."""
    optional = {_MASK, *(_BIASES_3 if layout.is_dinov3 else [_REGISTERS])}
    if _BIASES_3 & {layout.split(name)[1] for name in state}:  # one block has them: all do
        optional -= {".attention.q_proj.bias", ".attention.v_proj.bias"}
    blocks = range(_num_blocks(state, layout))
    known = {
        f"{layout.blocks}{number}{name}" if name.startswith(".") else name: name in optional
        for name in layout.keys
        for number in (blocks if name.startswith(".") else [0])
    }
    missing = [name for name, is_optional in known.items() if not is_optional and name not in state]
    return [name for name in state if name not in known], missing


def _num_blocks(state: Mapping[str, Tensor], layout: Layout) -> int:
    numbers = (layout.split(name)[0] for name in state)
    return max((int(number) + 1 for number in numbers if number), default=0)
