"""Files in the transformers library's layout that are not what the teacher takes: one message each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.teachers import transformers_layout
from mepa_ds.teachers.beside_weights import check_facts
from mepa_ds.teachers.known_vits import TIMM_NAMES, facts_of
from mepa_ds.teachers.registry import build_teacher
from tests.teachers import transformers_fixtures as fixtures
from tests.teachers.tiny_vits import tiny


def _mae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """ViT-MAE's names, and a decoder's."""
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense"}
    out = {"decoder.mask_token": torch.zeros(1, 1, 4)}
    for key, tensor in state.items():
        for ours, theirs in (*names.items(), ("mlp.fc2", "output.dense")):
            key = key.replace(ours, theirs)
        if "layer_scale" not in key and "mask_token" not in key:
            out[f"vit.{key}"] = tensor
    return out


def _clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    vision = {"embeddings.class_embedding", "encoder.layers.0.self_attn.q_proj.weight", "post_layernorm.weight"}
    return {f"vision_model.{name}": torch.zeros(48) for name in vision} | {"logit_scale": torch.zeros(())}


def _without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: tensor for key, tensor in state.items() if part not in key}


DINO = "not the weights of a DINOv2 or DINOv3 of the transformers library, or not all of them; nearest is its "
MISTAKES: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "ViT-MAE": ("dinov2", _mae, DINO + "dinov2, but .*encoder.layer.0.norm1.weight"),
    "CLIP": ("dinov2", _clip, "it has none of their names, but .*vision_model"),
    "a name": ("dinov2", lambda state: state | {"pooler.bias": torch.ones(3)}, "1 unexpected: pooler.bias"),
    "no key": (
        "dinov2",
        _without("layer.1.attention.attention.key.weight"),
        "1 missing: encoder.layer.1.attention.attention.key.weight",
    ),
    "no value": ("dinov3", _without("layer.0.attention.v_proj.bias"), "1 missing: layer.0.attention.v_proj.bias"),
    "no scale": ("dinov3", _without("layer.1.layer_scale2"), "1 missing: layer.1.layer_scale2.lambda1"),
    "no gate": ("dinov3-gated", _without("layer.1.mlp.gate_proj.bias"), "1 missing: layer.1.mlp.gate_proj.bias"),
    "no registers": ("dinov3", _without("register_tokens"), "1 missing: embeddings.register_tokens"),
    "a block": ("dinov2", _without("layer.1."), r"num_hidden_layers 1 \(dinov2: 2\)"),
    "the first block": ("dinov2", _without("layer.0."), "nearest is its dinov2, but 18 missing: encoder.layer.0"),
    "half a key": (
        "dinov2",
        lambda state: state | {"encoder.layer.0.attention.attention.key.weight": torch.ones(24, 48)},
        "the parts of blocks.0.attn.qkv.weight must have one shape and type",
    ),
    "half precision": (
        "dinov2",
        lambda state: state | {"encoder.layer.0.attention.attention.key.weight": torch.ones(48, 48).half()},
        "must have one shape and type, but have .48, 48. float32, .48, 48. float16",
    ),
    "a number": (
        "dinov3",
        lambda state: state | {"layer.0.attention.k_proj.weight": torch.tensor(1.0)},
        "the parts of blocks.0.attn.qkv.weight must have one shape and type",
    ),
    "numbers": ("dinov2", lambda state: {key: torch.tensor(1.0) for key in state}, "has shape ()"),
    "nothing": ("dinov2", lambda state: {key: tensor[:0] for key, tensor in state.items()}, "34 of another shape"),
    "a shape": (
        "dinov2",
        lambda state: state | {"encoder.layer.1.norm2.bias": torch.ones(47)},
        "1 of another shape: blocks.1.norm2.bias",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_message(mistake: str, tmp_path: Path) -> None:
    name, change, message = MISTAKES[mistake]
    save_file(change(fixtures.state_of(name)), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        tiny(name, tmp_path / "model.safetensors")


@pytest.mark.parametrize("given", fixtures.PUBLISHED)
def test_weights_of_another_teacher_name_it(given: str) -> None:
    """By shapes alone: heads, for one, show in no tensor."""
    state = {key: torch.empty(shape, device="meta") for key, shape in fixtures.shapes_of(given).items()}
    facts = transformers_layout.facts_of_weights(state, transformers_layout.layout_of(state, given), given)
    satellite = {"dinov3-l": " or dinov3-l-sat", "dinov3-7b": " or dinov3-7b-sat"}.get(given, "")
    for asked in fixtures.PUBLISHED:
        if asked == given:
            check_facts(facts, "FILE: the weights are", asked, facts_of(TIMM_NAMES[asked]))
            continue
        with pytest.raises(UserError, match=f"not {asked}, but .*; name the teacher {given}{satellite}, or give"):
            check_facts(facts, "FILE: the weights are", asked, facts_of(TIMM_NAMES[asked]))


def test_the_nearest_teacher_of_a_size_that_none_has() -> None:
    own = facts_of(TIMM_NAMES["dinov3-b"])
    assert own is not None
    with pytest.raises(UserError, match="no teacher here is like that; nearest is dinov3-b, with num_hidden_layers 12"):
        check_facts({**own, "num_hidden_layers": 11}, "FILE", "dinov3-l", facts_of(TIMM_NAMES["dinov3-l"]))


def test_a_file_that_is_no_dinos_is_timms() -> None:
    facts = {"model_type": "dinov2", "hidden_size": 768}
    with pytest.raises(UserError, match="not vit_base_patch16_224, of which timm's own file is read; name the teacher"):
        check_facts(facts, "FILE: the weights are", "vit_base_patch16_224", None)


def test_a_file_of_another_size_from_end_to_end(tmp_path: Path) -> None:
    state = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in fixtures.shapes_of("dinov2-s-reg").items()}
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"the weights are: not dinov2-s, but .*; name the teacher dinov2-s-reg,"):
        build_teacher("dinov2-s", tmp_path / "weights.safetensors")
