"""ViT teachers: grid, normalisation, prefix tokens, conversion of original checkpoints, bad weights.

Weights are random (timm models made without pretraining); shapes and file formats are the official ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.teachers.known_vits import TIMM_NAMES
from mepa_ds.teachers.registry import TEACHERS, build_teacher
from mepa_ds.teachers.timm_vit import TimmVit


def tiny(model_name: str, grid_side: int = 16, **sizes: Any) -> TimmVit:
    """An official architecture made small in depth and width."""
    torch.manual_seed(0)
    settings = {"depth": 2, "embed_dim": 48, "num_heads": 3, **sizes}
    model = timm.create_model(model_name, num_classes=0, dynamic_img_size=True, **settings)
    return TimmVit(model_name, model, grid_side).freeze()


def photos(count: int = 2, side: int = 256) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("model_name", "input_side"),
    [
        ("vit_small_patch14_dinov2", 224),
        ("vit_small_patch14_reg4_dinov2", 224),
        ("vit_small_patch16_dinov3", 256),
    ],
)
def test_grid_input_side_and_prefix_tokens(model_name: str, input_side: int) -> None:
    teacher = tiny(model_name)
    seen: list[Tensor] = []
    teacher.model.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    patches, cls = teacher.features(photos())
    assert patches.shape == (2, 256, 48)
    assert seen[0].shape == (2, 3, input_side, input_side)
    # The whole sequence by timm's own forward: CLS, registers, patches.
    tokens = teacher.model.forward_features(seen[0])
    assert tokens.shape[1] == 256 + teacher.model.num_prefix_tokens
    torch.testing.assert_close(patches, tokens[:, -256:])
    torch.testing.assert_close(cls, tokens[:, 0])


def test_normalisation_against_pillow() -> None:
    """[-1, 1] -> what an image library and ImageNet's statistics give, written out by hand."""
    teacher = tiny("vit_small_patch14_dinov2")
    seen: list[Tensor] = []
    teacher.model.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    gradient = torch.linspace(0, 255, 256).round()
    pixels = torch.stack([gradient.expand(256, 256), gradient.expand(256, 256).T, torch.full((256, 256), 77.0)])
    teacher.patch_features((pixels / 255 * 2 - 1)[None])
    image = Image.fromarray(pixels.permute(1, 2, 0).to(torch.uint8).numpy())
    resized = torch.tensor(list(image.resize((224, 224), Image.Resampling.BICUBIC).tobytes())).view(224, 224, 3)
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        expected = (resized[..., channel] / 255 - mean) / std
        # Pillow rounds to whole levels, once in each direction.
        torch.testing.assert_close(seen[0][0, channel], expected, rtol=0, atol=1.01 / 255 / std)


def test_position_embeddings_as_timm_resamples_them_on_load() -> None:
    teacher = tiny("vit_small_patch14_dinov2")
    fixed = timm.create_model(
        "vit_small_patch14_dinov2", num_classes=0, img_size=224, depth=2, embed_dim=48, num_heads=3
    ).eval()
    convert = timm.models.vision_transformer.checkpoint_filter_fn
    fixed.load_state_dict(convert(dict(teacher.model.state_dict()), fixed))
    side_224 = torch.nn.functional.interpolate(photos(), size=(224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
    normalised = ((side_224 + 1) / 2 - teacher.mean_311) / teacher.std_311
    with torch.no_grad():
        expected = fixed.forward_features(normalised)[:, 1:]
    torch.testing.assert_close(teacher.patch_features(photos()), expected, rtol=1e-4, atol=1e-4)


def test_oblong_grid_is_row_major() -> None:
    """A bright band in the top row of cells changes the features of that row most."""
    teacher = tiny("vit_small_patch16_dinov3", depth=1)
    dark = torch.full((1, 3, 64, 96), -1.0)
    banded = dark.clone()
    banded[:, :, :16] = 1
    change = (teacher.patch_features(banded, (4, 6)) - teacher.patch_features(dark, (4, 6))).norm(dim=-1).view(4, 6)
    assert change.mean(dim=1).argmax() == 0


def test_mean_pooling_vit_gets_its_final_norm() -> None:
    teacher = tiny("vit_small_patch16_224", global_pool="avg")
    assert isinstance(teacher.model.norm, torch.nn.Identity)
    features = teacher.patch_features(photos())
    torch.testing.assert_close(features.mean(-1), torch.zeros(2, 256), atol=1e-5, rtol=0)


def test_frozen_and_usable_in_a_loss() -> None:
    teacher = tiny("vit_small_patch16_dinov3")
    teacher.train()
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    student = torch.randn(2, 256, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        features = teacher.patch_features(photos())
    assert features.dtype == torch.float32
    torch.nn.functional.cosine_similarity(student, features, dim=-1).mean().backward()
    assert student.grad is not None


def test_integers_are_refused() -> None:
    pixels = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"expected floats in \[-1, 1\], got uint8; for 0\.\.255 give"):
        tiny("vit_small_patch16_dinov3").patch_features(pixels)


@pytest.fixture(scope="module")
def dinov2() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True).eval()


@pytest.fixture(scope="module")
def dinov3() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_dinov3", num_classes=0, dynamic_img_size=True).eval()


def test_timm_weights_from_a_local_file(tmp_path: Path, dinov2: Any) -> None:
    save_file(dinov2.state_dict(), tmp_path / "model.safetensors")
    by_alias = build_teacher("dinov2-s-reg", tmp_path / "model.safetensors")
    by_timm_name = build_teacher("vit_small_patch14_reg4_dinov2", tmp_path / "model.safetensors", grid_side=2)
    assert by_alias.identity == by_timm_name.identity != ""
    assert (by_alias.width, by_alias.grid_side, by_timm_name.grid_side) == (384, 16, 2)
    expected = TimmVit("reference", dinov2, 2).patch_features(photos(1))
    torch.testing.assert_close(by_timm_name.patch_features(photos(1)), expected)


def test_original_dinov2_file(tmp_path: Path, dinov2: Any) -> None:
    """The authors' layout: one pos_embed with an entry for CLS, `register_tokens`, a mask token."""
    state = dict(dinov2.state_dict())
    offset = torch.randn(1, 1, 384)
    state["pos_embed"] = torch.cat([offset, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - offset
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    teacher = build_teacher("dinov2-s-reg", tmp_path / "dinov2_vits14_reg4_pretrain.pth", grid_side=2)
    expected = TimmVit("reference", dinov2, 2).patch_features(photos(1))
    torch.testing.assert_close(teacher.patch_features(photos(1)), expected, rtol=1e-4, atol=1e-4)


def original_dinov3(model: Any, bias: float) -> dict[str, Tensor]:
    """The authors' layout of DINOv3, with the qkv bias that timm's model leaves out."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        state[name.replace("reg_token", "storage_tokens")] = tensor
    width = state["norm.weight"].shape[0]
    for block in range(12):
        state[f"blocks.{block}.attn.qkv.bias"] = torch.full((3 * width,), bias)
        state[f"blocks.{block}.attn.qkv.bias_mask"] = torch.cat(
            [torch.ones(width), torch.zeros(width), torch.ones(width)]
        )
    return state | {"mask_token": torch.zeros(1, width), "rope_embed.periods": torch.ones(16)}


def test_original_dinov3_file(tmp_path: Path, dinov3: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(original_dinov3(dinov3, bias=0.0), tmp_path / "dinov3.pth")
    teacher = build_teacher("dinov3-s", tmp_path / "dinov3.pth", grid_side=2)
    expected = TimmVit("reference", dinov3, 2).patch_features(photos(1))
    torch.testing.assert_close(teacher.patch_features(photos(1)), expected)
    assert capsys.readouterr().out == ""


def test_original_dinov3_file_with_a_bias_is_not_cut_silently(tmp_path: Path, dinov3: Any) -> None:
    torch.save(original_dinov3(dinov3, bias=0.1), tmp_path / "dinov3.pth")
    with pytest.raises(UserError, match="use the teacher vit_small_patch16_dinov3_qkvb"):
        build_teacher("dinov3-s", tmp_path / "dinov3.pth")
    assert build_teacher("vit_small_patch16_dinov3_qkvb", tmp_path / "dinov3.pth").width == 384


def test_weights_of_another_model_name_the_nearest_keys(tmp_path: Path, dinov3: Any) -> None:
    state = dict(dinov3.state_dict())
    state["blocks.0.attn.projection.weight"] = state.pop("blocks.0.attn.proj.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"blocks\.0\.attn\.proj\.weight \(nearest: blocks\.0\.attn\.projection\.weight"
    ):
        build_teacher("dinov3-s", tmp_path / "model.safetensors")


def test_weights_of_the_transformers_library(tmp_path: Path) -> None:
    save_file({"embeddings.cls_token": torch.zeros(1, 1, 384)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="transformers library"):
        build_teacher("dinov2-s", tmp_path / "model.safetensors")


def test_no_weights_given() -> None:
    with pytest.raises(UserError, match=r"teacher 'dinov2-b' needs weights.*vit_base_patch14_dinov2, or 'hub'"):
        build_teacher("dinov2-b", None)


def test_the_hub_is_asked_only_when_told_and_its_failure_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(model_name: str, pretrained: bool, **_: Any) -> None:
        asked.append((model_name, pretrained))
        raise OSError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"could not fetch vit_base_patch14_dinov2 from the hub \(no route"):
        build_teacher("dinov2-b", "hub")
    assert asked == [("vit_base_patch14_dinov2", True)]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the weights"):
        build_teacher("dinov3-s", tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("dinov2b", "dinov2-b"), ("vit_base_patch14_dino2", "vit_base_patch14_dinov2"), ("xyzzy", "known")],
)
def test_unknown_teacher(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"teacher '{name}' is unknown.*{hint}"):
        build_teacher(name, None)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224", "resnet18"])
def test_a_model_that_is_no_plain_vit(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a plain ViT"):
        build_teacher(name, tmp_path)


def test_every_registered_name_is_a_model_of_timm() -> None:
    assert TIMM_NAMES.keys() <= TEACHERS.keys()
    for name in TIMM_NAMES:
        with pytest.raises(UserError, match="needs weights") as caught:
            build_teacher(name, None)
        assert timm.is_model(str(caught.value).split("timm's ")[1].split(",")[0])
