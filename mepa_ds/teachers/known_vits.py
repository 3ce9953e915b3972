"""The ViTs that have a short name here, and what tells one DINOv2 or DINOv3 from another.

Facts have the names that the transformers library's config.json gives them, so that messages show the user's own words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from mepa_ds.errors import UserError

TIMM_NAMES = {
    "dinov2-s": "vit_small_patch14_dinov2",
    "dinov2-b": "vit_base_patch14_dinov2",
    "dinov2-l": "vit_large_patch14_dinov2",
    "dinov2-g": "vit_giant_patch14_dinov2",
    "dinov2-s-reg": "vit_small_patch14_reg4_dinov2",
    "dinov2-b-reg": "vit_base_patch14_reg4_dinov2",
    "dinov2-l-reg": "vit_large_patch14_reg4_dinov2",
    "dinov2-g-reg": "vit_giant_patch14_reg4_dinov2",
    "dinov3-s": "vit_small_patch16_dinov3",
    "dinov3-s-plus": "vit_small_plus_patch16_dinov3",
    "dinov3-b": "vit_base_patch16_dinov3",
    "dinov3-l": "vit_large_patch16_dinov3",
    "dinov3-l-sat": "vit_large_patch16_dinov3.sat493m",
    "dinov3-h-plus": "vit_huge_plus_patch16_dinov3",
    "dinov3-7b": "vit_7b_patch16_dinov3",
    "dinov3-7b-sat": "vit_7b_patch16_dinov3.sat493m",
}
"""Our short name of a ViT -> its name in timm, with a tag where the same network has weights of several trainings."""

Facts = dict[str, Any]
"""Facts of a network or its weights. What is not known is left out; what is not there (registers) is 0."""

DINOV2, DINOV2_REGISTERS, DINOV3 = "dinov2", "dinov2_with_registers", "dinov3_vit"
MODEL_TYPES = (DINOV2, DINOV2_REGISTERS, DINOV3)
"""`model_type` of the models of the transformers library that are read."""


def is_dino(model_name: str) -> bool:
    """Whether timm's model is a ViT of DINOv2 or DINOv3."""
    architecture = model_name.partition(".")[0]
    return architecture.startswith("vit_") and ("dinov2" in architecture or "dinov3" in architecture)


def settings_of(model_name: str) -> Any:
    """timm's settings of a model's weights (mean, std, tag); None where it has none.

    Raises UserError for a tag that the model does not have.
    """
    import timm

    try:
        return timm.models.get_pretrained_cfg(model_name)
    except RuntimeError as error:
        architecture = model_name.partition(".")[0]
        known = ", ".join(timm.list_pretrained(f"{architecture}.*"))
        raise UserError(
            f"teacher {model_name!r} is unknown; timm has {known or f'no tag of {architecture}'}"
        ) from error


@cache
def facts_of(model_name: str) -> Mapping[str, Any] | None:
    """What timm's model of that name is; None for one that is no DINOv2 or DINOv3."""
    import timm

    if not is_dino(model_name):
        return None
    with torch.device("meta"):
        return facts_of_model(timm.create_model(model_name, num_classes=0), model_name)


def facts_of_model(model: Any, model_name: str) -> Facts:
    """What a DINOv2 or DINOv3 is that timm has made."""
    import timm

    block, patch_side = model.blocks[0], model.patch_embed.patch_size[0]
    num_registers = model.num_prefix_tokens - 1
    is_gated = not isinstance(block.mlp, timm.layers.Mlp)
    facts = {
        "model_type": DINOV3 if "dinov3" in model_name else DINOV2_REGISTERS if num_registers else DINOV2,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "patch_size": patch_side,
        "num_register_tokens": num_registers,
        "layer_norm_eps": model.norm.eps,
        "gated MLP": is_gated,
        "intermediate_size": block.mlp.fc2.in_features,
    }
    if "dinov3" in model_name:
        return facts | {"rope_theta": model.rope.temperature, "hidden_act": "silu" if is_gated else "gelu"}
    rows, columns = model.patch_embed.grid_size
    return facts | {"image_size": rows * patch_side, "position_embeddings": rows * columns + 1}


def facts_of_config(config: Mapping[str, Any]) -> Facts:
    """What a config.json of the transformers library says, of one of MODEL_TYPES. Its values may be of any type."""
    kind = config.get("model_type")
    names = ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "layer_norm_eps"]
    # DINOv2's gated MLP is SiLU's whatever hidden_act says.
    names += ["rope_theta", "hidden_act", "intermediate_size"] if kind == DINOV3 else ["image_size"]
    names += [] if kind == DINOV2 else ["num_register_tokens"]
    facts = {name: _side(config[name]) for name in names if config.get(name) is not None}
    if (gated := config.get("use_gated_mlp" if kind == DINOV3 else "use_swiglu_ffn")) is not None:
        facts["gated MLP"] = gated
    return facts


def differences(said: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Facts that both have and that differ: (said, the model's)."""
    return {name: (said[name], model[name]) for name in said if name in model and not _same(said[name], model[name])}


def nearest_teachers(facts: Mapping[str, Any]) -> tuple[list[str], dict[str, tuple[Any, Any]]]:
    """(short names of the teachers that these facts are of, {}), or of the one that differs least, and in what.

    Several teachers share all sizes if they were trained on other images. None: no teacher is of that kind.
    """
    kind = str(facts.get("model_type"))
    known = {name: facts_of(model_name) for name, model_name in TIMM_NAMES.items()}
    wrong = {name: differences(facts, own) for name, own in known.items() if own and own["model_type"] == kind}
    if exact := [name for name in wrong if not wrong[name]]:
        return exact, {}
    nearest = min(wrong, key=lambda name: len(wrong[name]), default=None)
    return ([], {}) if nearest is None else ([nearest], wrong[nearest])


def short_name(model_name: str) -> str:
    """Our name of timm's where there is one; a network's name without a tag is also the first of its tags."""
    ours = {_with_tag(known): name for name, known in TIMM_NAMES.items()}
    return ours.get(_with_tag(model_name), model_name)


def _with_tag(model_name: str) -> str:
    settings = None if "." in model_name else settings_of(model_name)
    return f"{model_name}.{settings.tag}" if settings is not None and settings.tag else model_name


def _side(value: Any) -> Any:
    """One side of [14, 14]; anything else as it is."""
    return value[0] if isinstance(value, list) and len(value) == 2 and value[0] == value[1] else value


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, float | int) and isinstance(second, float | int):
        return math.isclose(first, second, rel_tol=1e-6)
    return bool(first == second)
