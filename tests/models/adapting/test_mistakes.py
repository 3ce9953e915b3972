"""Weights to start from that are damaged, or that say of themselves what is not so: one message each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mepa_ds.engine.starting.initial_weights import load_initial_weights
from mepa_ds.errors import UserError
from mepa_ds.models.adapting.adapt import CLASSES
from mepa_ds.models.adapting.experts import more_experts
from mepa_ds.models.adapting.scales import POSITIONS, SCALES
from tests.models.adapting.test_adapt import model_of

MOE: dict[str, Any] = {"num_experts": 4, "expert_ratio": 2.0, "bias_rate": 0.01}
GATE, STEPS = "blocks.0.ffn.router.gate.weight", "blocks.0.ffn.router.bias_steps_E"
OTHER: dict[str, Any] = {"scales": (1, 3), "num_classes": 7, "moe": MOE | {"num_experts": 8}}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(state: dict[str, Tensor]) -> None:
        state[name] = change(state[name]).clone()

    return apply


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda state: state.pop(POSITIONS), "1 missing: position_embed"),
        (changed(POSITIONS, lambda tensor: tensor.sum()), r"of another shape: position_embed: \(\) in the weights"),
        (changed(POSITIONS, lambda tensor: tensor[:, :7]), r"of another shape: position_embed: \(1, 7, 32\)"),
        (changed(SCALES, lambda tensor: tensor[:2]), r"of another shape: scale_embed\.weight"),
        (changed(CLASSES, lambda tensor: tensor[:2]), r"of another shape: class_embed\.weight"),
        (changed(GATE, lambda tensor: tensor.sum()), r"of another shape: blocks\.0\.ffn\.router\.gate\.weight"),
        (changed(GATE, lambda tensor: tensor[:2]), r"of another shape: blocks\.0\.ffn\.router\.gate\.weight"),
        (changed(STEPS, lambda tensor: tensor[:2]), r"of another shape: blocks\.0\.ffn\.router\.bias_steps_E"),
        (changed("head.weight", Tensor.int), r"1 that are not of floating-point numbers: head\.weight: int32"),
        (changed(POSITIONS, lambda tensor: tensor > 0), "not of floating-point numbers: position_embed: bool"),
        (
            changed("head.bias", lambda tensor: tensor / 0),
            r"NaN or infinity in 1 of its .* tensors, such as head\.bias",
        ),
    ],
)
@pytest.mark.parametrize("missing", ["classes", "all"])
def test_damaged_weights(tmp_path: Path, damage: Callable[..., object], told: str, missing: Any) -> None:
    """With what is adapted, which reads tensors before they are held against the recipe's model, and without."""
    model_of(moe=MOE).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    damage(state)
    save_file(state, tmp_path / "model.safetensors")
    run = model_of(**OTHER) if missing == "all" else model_of(moe=MOE)
    with pytest.raises(UserError, match=f"init_weights: {tmp_path}: .*{told}"):
        load_initial_weights(run, tmp_path, missing)


def test_a_router_of_one_number_is_copied_without_noise() -> None:
    old = model_of(scales=(1,), moe={"num_experts": 1, "top_k": 1, "router": "smoe"})
    found = more_experts(old.state_dict(), 3)
    table_SE = old.get_parameter("blocks.0.ffn.router.scale_logits_SE")
    assert torch.equal(found["blocks.0.ffn.router.scale_logits_SE"], table_SE.expand(1, 3))


def test_another_width_and_other_classes(tmp_path: Path) -> None:
    """The width is what to change: no row of the classes could be taken."""
    model_of(width=64).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.width: 64 there, 32 in the recipe\. .*set model\.width=64$"):
        load_initial_weights(model_of(num_classes=9), tmp_path)


def test_a_remedy_is_not_one_that_would_be_refused(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="it cannot be upcycled; use another router") as error:
        load_initial_weights(model_of(moe=MOE | {"router": "expert_choice", "bias_rate": 0.0}), tmp_path)
    assert "init_missing" not in str(error.value)


def test_names_of_more_classes_than_there_are_and_classes_without_names(tmp_path: Path) -> None:
    theirs, ours = model_of(num_classes=3), model_of(num_classes=3)
    theirs.class_names, ours.class_names = ("cat", "", "dog", "boot", "bag"), ("bag", "", "cat")
    theirs.save_pretrained(tmp_path)
    drawn = ours.class_embed.weight.detach().clone()
    load_initial_weights(ours, tmp_path)
    assert torch.equal(ours.class_embed.weight[:2], drawn[:2])
    assert torch.equal(ours.class_embed.weight[2:], theirs.class_embed.weight[[0, 3]])
