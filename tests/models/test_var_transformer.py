"""The transformer against numbers that VAR's own code computed (tests/fixtures/var)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mepa_ds.errors import UserError
from mepa_ds.models.transformer import NextScaleTransformer
from tests.var_fixtures import fixture_state, random_state, vectors

SCALES = (1, 2, 3, 4)


@pytest.mark.parametrize("layout", ["adaln", "shared", "adaln_nol2"])
def test_logits_equal_vars(layout: str) -> None:
    model = NextScaleTransformer.from_var(fixture_state(f"tiny_var_{layout}"), scales=SCALES, num_heads=2)
    arrays = vectors()
    with torch.no_grad():
        output = model(torch.from_numpy(arrays["labels"]), torch.from_numpy(arrays["teacher_input"]))
    expected = torch.from_numpy(arrays[f"logits_{layout}"])
    torch.testing.assert_close(output.logits_BLV, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "depth", "shared"), [("var_d16", 16, False), ("var_shared_adaln_d4_512", 4, True)])
def test_official_shapes_load_strictly(name: str, depth: int, shared: bool) -> None:
    model = NextScaleTransformer.from_var(random_state(name))
    assert model.config.depth == depth
    assert model.config.shared_adaln is shared
    assert depth == model.config.H


def test_unknown_key_is_named_with_its_neighbour() -> None:
    state = fixture_state("tiny_var_adaln")
    state["blocks.0.attn.prj.weight"] = state.pop("blocks.0.attn.proj.weight")
    with pytest.raises(UserError, match=r"1 missing: blocks\.0\.attn\.proj\.weight \(nearest: blocks\.0\.attn\.prj"):
        NextScaleTransformer.from_var(state, scales=SCALES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lvl_embed.weight": None}, r"1 missing: lvl_embed\.weight$"),
        ({"head_nm.ada_lin.1.weight": None}, r"1 missing: head_nm\.ada_lin\.1\.weight$"),
        ({"blocks.1.ada_lin.1.weight": None}, r"1 missing: blocks\.1\.ada_lin\.1\.weight$"),
        ({"blocks.0.attn.scale_mul_1H11": None}, r"1 missing: blocks\.0\.attn\.scale_mul_1H11$"),
        ({"blocks.0.attn.scale_mul_1H11": torch.zeros(2)}, r"shape: blocks\.0\.attn\.scale_mul_1H11: \(2,\) in"),
        ({"head.weight": torch.zeros(64)}, r"1 of another shape: head\.weight: \(64,\) in .*, \(64, 128\) in"),
        ({"head.weight": torch.zeros(64, 256)}, r"1 of another shape: head\.weight: \(64, 256\) in"),
        ({"blocks.x.y": torch.zeros(1)}, r"1 unexpected: blocks\.x\.y"),
        ({"lvl_embd.weight": torch.zeros(4, 128)}, r"unexpected: lvl_embd\.weight \(nearest: lvl_embed\.weight\)$"),
    ],
)
def test_the_one_tensor_at_fault_is_named_as_in_the_file(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    state = {**fixture_state("tiny_var_adaln"), **change}
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "var.pth")
    with pytest.raises(UserError, match=r"var\.pth: the weights do not fit the model; [^;]*" + message):
        NextScaleTransformer.from_var(tmp_path / "var.pth", scales=SCALES)


def without(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}


def test_a_file_without_its_last_blocks_is_no_shallower_model() -> None:
    state = without(fixture_state("tiny_var_adaln"), "blocks.1.")
    with pytest.raises(UserError, match=r"do not fit the model; without block 1: a VAR .* of width 128 has 2 blocks"):
        NextScaleTransformer.from_var(state, scales=SCALES)


def test_blocks_beyond_the_depth_are_unexpected() -> None:
    state = {**fixture_state("tiny_var_adaln"), "blocks.5.ffn.fc1.bias": torch.zeros(512)}
    with pytest.raises(UserError, match=r"fit the model; 1 unexpected: blocks\.5\.ffn\.fc1\.bias \(nearest: [^;]*$"):
        NextScaleTransformer.from_var(state, scales=SCALES)


@pytest.mark.parametrize("name", ["head.weight", "class_emb.weight", "word_embed.weight", "pos_1LC"])
def test_a_tensor_that_sizes_are_read_off_is_missing(name: str) -> None:
    state = fixture_state("tiny_var_adaln")
    state[f"{name}s"] = state.pop(name)
    with pytest.raises(UserError, match=rf"not a VAR transformer's state dict; without {name} \(nearest: {name}s\)$"):
        NextScaleTransformer.from_var(state, scales=SCALES)


def test_names_of_ours_in_the_file_do_not_replace_the_official_ones() -> None:
    ours = "blocks.0.attention.qkv.weight"
    state = {**fixture_state("tiny_var_adaln"), ours: torch.zeros(384, 128)}
    with pytest.raises(UserError, match=r"1 unexpected: blocks\.0\.attention\.qkv\.weight \(not in VAR's layout\)"):
        NextScaleTransformer.from_var(state, scales=SCALES)


@pytest.mark.parametrize("scales", [5, ("1", 2), (1.0, 2), "1234", [None]])
def test_scales_that_are_none(tmp_path: Path, scales: Any) -> None:
    message = r"scales: expected sides such as \(1, 2, 3, 4\), got "
    with pytest.raises(UserError, match=message):
        NextScaleTransformer.from_var(fixture_state("tiny_var_adaln"), scales=scales)
    with pytest.raises(UserError, match=message):
        NextScaleTransformer.from_preset("var-d2", scales=scales)
    NextScaleTransformer.from_var(fixture_state("tiny_var_adaln"), scales=SCALES).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        NextScaleTransformer.open(tmp_path, scales)


def test_sizes_that_no_tensor_tells() -> None:
    state = fixture_state("tiny_var_adaln")
    state["pos_1LC"] = torch.zeros(30)
    del state["lvl_1L"]
    with pytest.raises(UserError, match=r"key 'pos_1LC' has shape \(30,\), expected 3 dimensions"):
        NextScaleTransformer.from_var(state, scales=SCALES)


def test_wrong_shape_names_layer_and_sizes() -> None:
    state = fixture_state("tiny_var_adaln")
    state["blocks.1.ffn.fc2.weight"] = torch.zeros(128, 500)
    with pytest.raises(UserError, match=r"blocks\.1\.ffn\.fc2\.weight.*\(128, 500\).*\(128, 512\)"):
        NextScaleTransformer.from_var(state, scales=SCALES)


def test_scales_of_another_length_are_refused() -> None:
    state = without(fixture_state("tiny_var_adaln"), "lvl_1L")
    with pytest.raises(UserError, match="30 positions"):
        NextScaleTransformer.from_var(state, scales=(1, 2, 3))


@pytest.mark.parametrize("labels", [[0, 11], [-1, 3]])
def test_labels_outside_the_classes_are_refused(labels: list[int]) -> None:
    model = NextScaleTransformer.from_var(fixture_state("tiny_var_adaln"), scales=SCALES)
    with pytest.raises(UserError, match=r"labels: expected 0\.\.9"):
        model(torch.tensor(labels), torch.zeros(2, 29, 8))
