"""What VAR's programs write beside its public weights: what holds a network opens; what that does not tell is asked."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.generation.model_files import load_pretrained
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer import MultiScaleQuantizer, Tokenizer
from tests.var_fixtures import TINY_SCALES, fixture_state, vector

VAR_HF: dict[str, Any] = {
    "depth": 2, "embed_dim": 128, "num_heads": 2, "num_classes": 10, "norm_eps": 1e-6, "attn_l2_norm": True,
    "patch_nums": TINY_SCALES, "vae_kwargs": {"vocab_size": 64, "z_channels": 8, "ch": 32},
}  # fmt: skip


def training_checkpoint(var: dict[str, Tensor], **args: object) -> dict[str, Any]:
    """As VAR's train.py writes its ar-ckpt-last.pth."""
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    config = {"patch_nums": TINY_SCALES, "label_smooth": 0.0, "first_prog": True}
    trainer = {"config": config, "var_wo_ddp": var, "vae_local": fixture_state("tiny_vae"), "var_opt": optimizer}
    return {"epoch": 3, "iter": 0, "trainer": trainer, "args": OrderedDict(pn="1_2_3_4", depth=2, **args)}


def untold(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without VAR's buffer that tells the schedule."""
    return {name: tensor for name, tensor in state.items() if name != "lvl_1L"}


def write_hub(directory: Path, state: dict[str, Tensor], config: dict[str, Any], pickled: bool = False) -> Path:
    directory.mkdir(exist_ok=True)
    if pickled:
        torch.save(state, directory / "pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def assert_is_var(model: NextScaleTransformer, layout: str) -> None:
    with torch.no_grad():
        logits_BLV = model(vector("labels"), vector("teacher_input")).logits_BLV
    torch.testing.assert_close(logits_BLV, vector(f"logits_{layout}"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["adaln", "adaln_nol2"])
def test_a_checkpoint_of_vars_training_holds_both_networks(tmp_path: Path, layout: str) -> None:
    """Its settings tell the schedule and, without QK normalisation, the heads; nothing is given."""
    path = tmp_path / "ar-ckpt-last.pth"
    torch.save(training_checkpoint(untold(fixture_state(f"tiny_var_{layout}"))), path)
    assert_is_var(NextScaleTransformer.open(path), layout)
    tokenizer = Tokenizer.open(path)
    assert tokenizer.config.scales == TINY_SCALES
    assert torch.equal(tokenizer.encode(vector("image")), vector("tokens"))
    assert torch.equal(MultiScaleQuantizer.load(path).codebook.weight, tokenizer.quantizer.codebook.weight)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_directory_of_vars_own_class(tmp_path: Path, pickled: bool) -> None:
    state, config = untold(fixture_state("tiny_var_adaln_nol2")), {**VAR_HF, "attn_l2_norm": False}
    path = write_hub(tmp_path / "hub", state, config, pickled)
    inside = path / ("pytorch_model.bin" if pickled else "model.safetensors")
    for model in (
        NextScaleTransformer.open(path),
        NextScaleTransformer.from_var(path),
        NextScaleTransformer.open(inside),
    ):
        assert_is_var(model, "adaln_nol2")
    assert isinstance(load_pretrained(path), NextScaleTransformer)
    with pytest.raises(UserError, match=r"scales: .*hub was trained with \[1, 2, 3, 4\], and has no other"):
        NextScaleTransformer.open(path, (1, 2, 5))
    with pytest.raises(UserError, match=r"num_heads: .*hub was trained with 2, and has no other; got 4"):
        NextScaleTransformer.open(path, num_heads=4)
    with pytest.raises(UserError, match="not a VAR tokenizer"):
        Tokenizer.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"embed_dim": 192},
            r"the weights are of width 128, but the settings .*config\.json.* of a model of width 192",
        ),
        ({"norm_eps": 1e-5}, "trained with norm_eps 1e-05; only VAR's 1e-06"),
        ({"depth": 3}, "without block 2 of a model of depth 3"),
        ({"patch_nums": [1, 2, 3]}, r"scales: the weights hold 30 positions, but \[\[1, 2, 3\]\] make \[14\]"),
    ],
)
def test_settings_that_are_not_of_the_weights(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_hub(tmp_path / "hub", untold(fixture_state("tiny_var_adaln")), {**VAR_HF, **change})
    with pytest.raises(UserError, match=rf"hub: .*{message}"):
        NextScaleTransformer.open(path)


def test_a_directory_of_another_model_is_named_as_such(tmp_path: Path) -> None:
    for config, held in (
        ({"hidden_size": 3}, r"does not say what it holds \(no model_type\)"),
        ({"model_type": "vit"}, "'vit'"),
    ):
        path = write_hub(tmp_path / "hub", {"a": torch.zeros(1)}, config)
        with pytest.raises(UserError, match=rf"expected a next_scale_transformer, but config\.json .*{held}"):
            NextScaleTransformer.open(path)


def test_the_schedule_is_read_off_vars_buffer() -> None:
    model = NextScaleTransformer.from_var(fixture_state("tiny_var_adaln"))
    assert model.config.scales == TINY_SCALES
    with pytest.raises(UserError, match=r"scales: the state dict was trained with .*, and has no other"):
        NextScaleTransformer.from_var(fixture_state("tiny_var_adaln"), scales=(1, 2, 5))


def test_heads_that_no_tensor_shows_are_asked_for(tmp_path: Path) -> None:
    state = fixture_state("tiny_var_adaln_nol2")
    with pytest.raises(UserError, match=r"say num_heads=2 \(--num-heads 2; model\.num_heads in a recipe\)"):
        NextScaleTransformer.from_var(state)
    assert_is_var(NextScaleTransformer.from_var(state, num_heads=2), "adaln_nol2")
    assert NextScaleTransformer.from_var(state, num_heads=8).config.H == 8
    with pytest.raises(UserError, match="num_heads: the state dict was trained with 2, and has no other; got 4"):
        NextScaleTransformer.from_var(fixture_state("tiny_var_adaln"), num_heads=4)


def test_a_depth_that_is_not_vars_is_asked_for() -> None:
    state = fixture_state("tiny_var_adaln")
    shallow = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.1.")}
    with pytest.raises(UserError, match=r"without block 1: .* or say depth=1 \(--depth 1\) if the model has no more"):
        NextScaleTransformer.from_var(shallow)
    assert NextScaleTransformer.from_var(shallow, depth=1).config.depth == 1
    deep = {**state, **{name.replace("blocks.1.", "blocks.2."): state[name] for name in state if "blocks.1." in name}}
    with pytest.raises(UserError, match=r"depth: the weights have 3 blocks, .* width 128 has 2; say depth=3"):
        NextScaleTransformer.from_var(deep)
    assert NextScaleTransformer.from_var(deep, depth=3).config.depth == 3
    with pytest.raises(UserError, match="depth: the state dict was trained with 2, and has no other; got 1"):
        NextScaleTransformer.from_var(state, depth=1)
    torn = {name: tensor for name, tensor in deep.items() if not name.startswith("blocks.1.")}
    with pytest.raises(UserError, match=r"without block 1 of a model of depth 3\. Download or copy"):
        NextScaleTransformer.from_var(torn, depth=3)


def test_a_phi_ratio_is_read_given_or_said_to_be_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(fixture_state("tiny_vae"), tmp_path / "vae.pth")
    for _ in range(2):
        assert Tokenizer.open(tmp_path / "vae.pth", TINY_SCALES).config.phi_ratio == 0.5
    assert capsys.readouterr().err.count("phi_ratio is not told") == 1
    told = Tokenizer.open(tmp_path / "vae.pth", TINY_SCALES, phi_ratio=0.25)
    assert told.config.phi_ratio == 0.25
    config = {"vocab_size": 64, "z_channels": 8, "ch": 32, "quant_resi": 0.25, "v_patch_nums": TINY_SCALES}
    path = write_hub(tmp_path / "hub", fixture_state("tiny_vae"), config)
    for tokenizer in (Tokenizer.open(path), load_pretrained(path)):
        assert isinstance(tokenizer, Tokenizer)
        assert tokenizer.config == told.config
    told.save_pretrained(tmp_path / "ours")
    assert capsys.readouterr().err == ""
    for other in (path, tmp_path / "ours"):
        with pytest.raises(UserError, match=r"phi_ratio: .* was trained with 0\.25, and has no other; got 0\.5"):
            Tokenizer.open(other, phi_ratio=0.5)
    write_hub(path, fixture_state("tiny_vae"), {**config, "using_znorm": True})
    with pytest.raises(UserError, match="trained with using_znorm"):
        Tokenizer.open(path)


@pytest.mark.parametrize("names", ["module.{}", "_orig_mod.{}", "var.{}", "_fsdp_wrapped_module.module.{}"])
def test_names_of_wrappers_and_of_whole_programs(tmp_path: Path, names: str) -> None:
    """Also in the middle: blocks are compiled or checkpointed one by one."""
    state = fixture_state("tiny_var_adaln")
    wrapped = {names.format(name.replace("attn.", "_checkpoint_wrapped_module.attn.")): state[name] for name in state}
    torch.save({"state_dict": {**wrapped, "n_averaged": torch.tensor(3)}, "epoch": 1}, tmp_path / "w.pth")
    save_file({name: tensor.contiguous() for name, tensor in wrapped.items()}, tmp_path / "w.safetensors")
    for path in (tmp_path / "w.pth", tmp_path / "w.safetensors"):
        assert_is_var(NextScaleTransformer.open(path), "adaln")


def test_averaged_weights_beside_the_last_ones_are_the_users_choice(tmp_path: Path) -> None:
    state = fixture_state("tiny_var_adaln")
    averaged = {name: tensor + 0.1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    torch.save({"model": state, "model_ema": averaged}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"more than one state dict of VAR's transformer .*'model', 'model_ema'"):
        NextScaleTransformer.open(tmp_path / "w.pth")
    torch.save({"model": state, "ema": dict(state)}, tmp_path / "same.pth")
    assert_is_var(NextScaleTransformer.open(tmp_path / "same.pth"), "adaln")


def test_weights_of_ours_in_a_file_of_their_own(tmp_path: Path) -> None:
    model = NextScaleTransformer.from_var(fixture_state("tiny_var_adaln"))
    model.save_pretrained(tmp_path / "model")
    for load, path in (
        (NextScaleTransformer.open, tmp_path / "model" / "model.safetensors"),
        (NextScaleTransformer.from_var, tmp_path / "model"),
    ):
        with pytest.raises(UserError, match=r"these are weights of mepa_ds: .* take their directory"):
            load(path)
    Tokenizer.from_var(fixture_state("tiny_vae"), TINY_SCALES).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"These are weights of mepa_ds: .* take their directory"):
        Tokenizer.open(tmp_path / "tokenizer" / "model.safetensors")


def test_files_of_another_network_are_named_with_what_they_are(tmp_path: Path) -> None:
    """One message each, with the nearest names."""
    vit = {
        "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4),
        "norm.weight": torch.zeros(8),
        "head.weight": torch.zeros(3, 8),
    }
    for name, state in (("vit", vit), ("vae", fixture_state("tiny_vae")), ("var", fixture_state("tiny_var_adaln"))):
        torch.save(state, tmp_path / f"{name}.pth")
    for load, name, message in (
        (NextScaleTransformer.open, "vit", r"word_embed\.weight \(nearest: norm\.weight\).* weights of a ViT, such"),
        (
            NextScaleTransformer.open,
            "vae",
            r"not a VAR transformer's state dict; .*These are weights of VAR's tokenizer$",
        ),
        (Tokenizer.open, "var", r"not a VAR tokenizer: no key .*These are weights of VAR's transformer$"),
        (Tokenizer.open, "vit", r"not a VAR tokenizer: .*These are weights of a ViT, such as a teacher's$"),
    ):
        with pytest.raises(UserError, match=message):
            load(tmp_path / f"{name}.pth")


def test_arguments_of_a_class_are_refused_with_a_way(tmp_path: Path) -> None:
    checkpoint = training_checkpoint(fixture_state("tiny_var_adaln"))
    torch.save({**checkpoint, "args": argparse.Namespace(depth=2)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"argparse\.Namespace.*Load it in the program that wrote it, save the weights"):
        NextScaleTransformer.open(tmp_path / "w.pth")
