"""What stands beside a ViT's weights contradicts the teacher: one message, which names the right one, before any
weights are read. No weights are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from mepa_ds.errors import UserError
from mepa_ds.teachers.beside_weights import check_beside
from mepa_ds.teachers.known_vits import TIMM_NAMES
from mepa_ds.teachers.registry import build_teacher
from mepa_ds.teachers.timm_vit import TimmVit
from tests.teachers import transformers_fixtures as fixtures

SATELLITE = {"image_mean": [0.43, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]}
WEB = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def folder(path: Path, **files: Any) -> Path:
    """A directory with the JSON files of those names."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def check(path: Path, teacher: str) -> None:
    check_beside(path, teacher, TIMM_NAMES.get(teacher, teacher))


def refused(path: Path, teacher: str) -> str:
    with pytest.raises(UserError) as caught:
        check(path, teacher)
    return str(caught.value)


@pytest.mark.parametrize("name", fixtures.PUBLISHED)
def test_the_published_settings_fit_their_teacher_alone(name: str, tmp_path: Path) -> None:
    path = folder(tmp_path, config=fixtures.models()[name]["config"], preprocessor_config=WEB)
    check(path, name)
    check(path / "model.safetensors", name)
    others = [other for other in fixtures.PUBLISHED if other != name]
    for other in others:
        told = refused(path, other)
        assert told.startswith(f"{path}: config.json says: not {other}, but ")
        assert f"; name the teacher {name}" in told
        assert told.endswith(f"or give weights of {other}")
    check(path / "other.safetensors", others[0])  # its config.json need not be this one


def test_satellite_teachers_normalise_as_they_were_trained(tmp_path: Path) -> None:
    for name, width in (("dinov3-l-sat", 1024), ("dinov3-7b-sat", 4096)):
        teacher = TimmVit.outline(name, TIMM_NAMES[name])
        assert teacher.width == width
        settings = timm.models.get_pretrained_cfg(TIMM_NAMES[name])
        assert (settings.mean, settings.std) == ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
    with torch.device("cpu"):
        model = timm.create_model(TIMM_NAMES["dinov3-l-sat"], num_classes=0, dynamic_img_size=True, depth=1)
    teacher = TimmVit("dinov3-l-sat", model, 1)
    seen: list[torch.Tensor] = []
    teacher.model.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    teacher.patch_features(torch.full((1, 3, 16, 16), -0.14))  # 0.43 of 0..1
    expected = (0.43 - torch.tensor([0.430, 0.411, 0.296])) / torch.tensor([0.213, 0.156, 0.143])
    torch.testing.assert_close(seen[0][0, :, 3, 3], expected)


@pytest.mark.parametrize("size", ["l", "7b"])
def test_preprocessor_of_the_other_corpus(size: str, tmp_path: Path) -> None:
    web, satellite = f"dinov3-{size}", f"dinov3-{size}-sat"
    path = folder(tmp_path / "weights", config=fixtures.models()[web]["config"], preprocessor_config=SATELLITE)
    check(path, satellite)
    told = refused(path, web)
    assert told.startswith(f"{path}/preprocessor_config.json: says image_mean [0.43, 0.411, 0.296], but {web} takes")
    assert told.endswith(f"; name the teacher {satellite}, or give weights of {web}")
    folder(path, preprocessor_config=WEB)
    check(path, web)
    assert f"name the teacher {web}, or" in refused(path, satellite)
    folder(path, preprocessor_config=WEB | {"do_normalize": False})
    check(path, satellite)
    folder(path, preprocessor_config={"image_mean": 0.5, "image_std": [0.5, 0.5, 0.5]})
    assert "says image_mean 0.5, but" in refused(path, web)
    assert "no teacher here is like that" in refused(path, web)


@pytest.mark.parametrize("mean", [[0.4], ["a", "b", "c"], [None] * 3, {}, "0.485", [[0.4]] * 3, [1e300, True, 0]])
def test_a_mean_that_is_none(mean: object, tmp_path: Path) -> None:
    path = folder(tmp_path, preprocessor_config={"image_mean": mean})
    assert "preprocessor_config.json: says image_mean" in refused(path, "dinov2-b")


@pytest.mark.parametrize(
    "place",
    [
        "dinov3-vitl16-pretrain-{}",
        "dinov3-vitl16-pretrain-{}/model.safetensors",
        "dinov3_vitl16_pretrain_{}-eadcf0ff.pth",
        "DINOv3_ViT-L16_{}.safetensors",
        "models--facebook--dinov3-vitl16-pretrain-{}/snapshots/0123abcd",
        "models--timm--vit_large_patch16_dinov3.{}/snapshots/0123abcd/model.safetensors",
    ],
)
def test_names_say_the_corpus(place: str, tmp_path: Path) -> None:
    for said, right, wrong in (("sat493m", "dinov3-l-sat", "dinov3-l"), ("lvd1689m", "dinov3-l", "dinov3-l-sat")):
        path = tmp_path / place.format(said)
        check(path, right)
        told = refused(path, wrong)
        assert f"trained on {said}" in told
        assert f"; name the teacher {right}, or give weights of {wrong}" in told
    # Only names of the weights count, and those of the Hub's cache: not where the user keeps them.
    check(tmp_path / "sat493m-study" / "weights.pth", "dinov3-l")
    check(tmp_path / "dinov3-vitl16-pretrain-sat493m.pth", "dinov2-b")


def test_a_link_into_the_cache_says_the_corpus(tmp_path: Path) -> None:
    blob = tmp_path / "models--facebook--dinov3-vitl16-pretrain-sat493m/blobs/0123abcd"
    blob.parent.mkdir(parents=True)
    save_file({"x": torch.ones(1)}, blob)
    (tmp_path / "teacher.safetensors").symlink_to(blob)
    assert "name the teacher dinov3-l-sat" in refused(tmp_path / "teacher.safetensors", "dinov3-l")
    with pytest.raises(UserError, match="name the teacher dinov3-l-sat"):
        build_teacher("dinov3-l", tmp_path / "teacher.safetensors")
    (tmp_path / "circle.pth").symlink_to("circle.pth")
    check(tmp_path / "circle.pth", "dinov3-l")


def test_a_corpus_that_the_size_has_not(tmp_path: Path) -> None:
    told = refused(tmp_path / "dinov3_vitb16_sat493m.pth", "dinov3-b")
    assert "name the teacher dinov3-l-sat or dinov3-7b-sat" in told


def test_sizes_come_before_the_corpus_and_the_corpus_narrows_them(tmp_path: Path) -> None:
    small = folder(tmp_path / "dinov3-vits16-pretrain-lvd1689m", config=fixtures.models()["dinov3-s"]["config"])
    assert "name the teacher dinov3-s, or" in refused(small, "dinov3-l-sat")
    config = fixtures.models()["dinov3-l"]["config"]
    for corpus, right in (("sat493m", "dinov3-l-sat"), ("lvd1689m", "dinov3-l"), ("mine", "dinov3-l or dinov3-l-sat")):
        path = folder(tmp_path / f"dinov3-vitl16-pretrain-{corpus}", config=config)
        assert f"name the teacher {right}, or give weights of dinov3-b" in refused(path, "dinov3-b")


def test_config_names_the_model_that_it_was_made_from(tmp_path: Path) -> None:
    config = fixtures.models()["dinov3-l"]["config"] | {"_name_or_path": "facebook/dinov3-vitl16-pretrain-sat493m"}
    assert "name the teacher dinov3-l-sat" in refused(folder(tmp_path, config=config), "dinov3-l")


def test_settings_that_change_the_numbers_but_no_shape(tmp_path: Path) -> None:
    for name, change in (
        ("dinov2-b", {"num_attention_heads": 24}),
        ("dinov2-b", {"layer_norm_eps": 1e-5}),
        ("dinov2-b", {"patch_size": [16, 16]}),
        ("dinov2-b", {"image_size": 224}),
        ("dinov3-b", {"rope_theta": 1e4}),
        ("dinov3-b", {"hidden_act": "relu"}),
    ):
        path = folder(tmp_path, config=fixtures.models()[name]["config"] | change)
        told = refused(path, name)
        key = next(iter(change))
        assert f"not {name}, but {key} " in told
        assert f"no teacher here is like that; nearest is {name}, with {key} " in told
    check(folder(tmp_path, config=fixtures.models()["dinov2-b"]["config"] | {"patch_size": [14, 14]}), "dinov2-b")


@pytest.mark.parametrize("value", [None, "14", [], [14, 15], {"a": 1}, -1, 10**200, True, [[14]], "x" * 10_000])
def test_values_of_any_type(value: object, tmp_path: Path) -> None:
    """A null says nothing. All else is one message of bounded length."""
    config = fixtures.models()["dinov2-b"]["config"]
    for key in ("hidden_size", "patch_size", "num_hidden_layers", "use_swiglu_ffn", "layer_norm_eps", "image_size"):
        path = folder(tmp_path, config=config | {key: value})
        if value is None:
            check(path, "dinov2-b")
        else:
            assert len(refused(path, "dinov2-b")) < 1000


@pytest.mark.parametrize("kind", ["vit_mae", "clip", "tokenizer", 7, ["dinov2"]])
def test_another_kind_of_model(kind: object, tmp_path: Path) -> None:
    told = refused(folder(tmp_path, config={"model_type": kind, "hidden_size": 768}), "dinov2-b")
    assert "config.json says that it holds " in told
    assert "not dinov2-b; of the transformers library's models, those of type dinov2, dinov2_with_registers, " in told


def test_a_dino_for_a_teacher_that_is_none(tmp_path: Path) -> None:
    path = folder(tmp_path, config=fixtures.models()["dinov2-b"]["config"])
    for teacher in ("vit_base_patch16_224", "convnext_tiny.dinov3_lvd1689m"):
        assert "name the teacher dinov2-b" in refused(path, teacher)


def test_directories_of_timm(tmp_path: Path) -> None:
    """Their config.json has an architecture and the settings of the weights."""
    settings = {"tag": "sat493m", "mean": [0.43, 0.411, 0.296], "std": [0.213, 0.156, 0.143]}
    config = {"architecture": "vit_large_patch16_dinov3", "pretrained_cfg": settings}
    path = folder(tmp_path, config=config)
    check(path, "dinov3-l-sat")
    check(path, "vit_large_patch16_dinov3_qkvb.sat493m")
    assert "name the teacher dinov3-l-sat" in refused(path, "dinov3-l")
    assert "it holds timm's vit_large_patch16_dinov3, not dinov2-l; name the teacher dinov3-l" in refused(
        path, "dinov2-l"
    )
    folder(tmp_path, config=config | {"model_type": "timm_wrapper"})
    check(path, "dinov3-l-sat")
    folder(tmp_path, config={"architecture": "vit_base_patch16_384", "pretrained_cfg": {"mean": [0.5] * 3}})
    check(path, "vit_base_patch16_224")  # position embeddings are resampled
    folder(tmp_path, config={"architecture": "vit_base_patch16_224", "pretrained_cfg": {"mean": [0.2] * 3}})
    assert "config.json: says mean [0.2, 0.2, 0.2], but" in refused(path, "vit_base_patch16_224")
    folder(tmp_path, config={"architecture": "vit_base_patch16_dinov3.none", "pretrained_cfg": []})
    assert "name the teacher vit_base_patch16_dinov3.none" in refused(path, "dinov2-b")


def test_a_tag_that_timm_has_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'vit_large_patch16_dinov3\.x' is unknown; timm has .*dinov3\.sat493m"):
        build_teacher("vit_large_patch16_dinov3.x", tmp_path)


def test_broken_json_is_one_message(tmp_path: Path) -> None:
    for name in ("config", "preprocessor_config"):
        (tmp_path / f"{name}.json").write_text("{")
        assert f"{name}.json: cannot read it as JSON" in refused(tmp_path, "dinov2-b")
        (tmp_path / f"{name}.json").unlink()
