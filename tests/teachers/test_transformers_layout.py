"""DINOv2 and DINOv3 from the transformers library's files, against numbers that the library computed
(tests/fixtures/transformers)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.teachers import transformers_layout
from mepa_ds.teachers.known_vits import TIMM_NAMES, differences, facts_of
from mepa_ds.teachers.registry import build_teacher
from mepa_ds.teachers.timm_vit import TimmVit
from mepa_ds.weights.directories import load_strict
from tests.teachers import transformers_fixtures as fixtures
from tests.teachers.tiny_vits import tiny
from tests.teachers.transformers_fixtures import GRIDS, TINY, TINY_SIZES

# The library resamples the position embeddings of DINOv2 without registers, and only those, without antialiasing.
OTHERWISE = {(name, GRIDS[1]) for name in ("dinov2", "dinov2-swiglu")}
EXACT = [(name, grid) for name in TINY for grid in GRIDS if (name, grid) not in OTHERWISE]


@pytest.mark.parametrize(("name", "grid"), EXACT)
def test_features_are_those_of_the_library(name: str, grid: tuple[int, int], tmp_path: Path) -> None:
    teacher = tiny(name, fixtures.write(tmp_path, name))
    patches_BNC, cls_BC = teacher.features(fixtures.image(teacher.pixels_per_cell, grid), grid)
    expected = fixtures.output(name, grid)
    assert expected.std() > 0.5
    torch.testing.assert_close(patches_BNC, expected[:, -math.prod(grid) :], rtol=0, atol=1e-5)
    torch.testing.assert_close(cls_BC, expected[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_no_number_is_lost(name: str) -> None:
    """Only what is computed to be 0 comes in: DINOv3's bias of keys."""
    state = fixtures.state_of(name)
    before = torch.cat([tensor.flatten() for tensor in state.values()]).sort().values
    layout = transformers_layout.layout_of(state, name)
    authors = transformers_layout.to_authors(state, layout, name)
    after = torch.cat([tensor.flatten() for tensor in authors.values()]).sort().values
    assert before.ne(0).all()
    assert torch.equal(after[after != 0], before)
    zeros = 2 * TINY_SIZES["embed_dim"] if "blocks.0.attn.qkv.bias" in authors and name.startswith("dinov3") else 0
    assert after.eq(0).sum() == zeros


def _in_memory(key: str) -> str:
    """The name in a model of release 5 in memory of what is so named in files."""
    key = key.replace("attention.attention.query", "attention.q_proj").replace(
        "attention.attention.key", "attention.k_proj"
    )
    key = key.replace("attention.attention.value", "attention.v_proj").replace(
        "attention.output.dense", "attention.o_proj"
    )
    key = key.replace("mlp.weights_out", "mlp.down_proj")
    return key if key.startswith("encoder.") else key.replace("layer.", "model.layer.", 1)


@pytest.mark.parametrize("name", TINY)
def test_a_state_dict_of_release_5_in_memory(name: str, tmp_path: Path) -> None:
    state: dict[str, Tensor] = {}
    for key, tensor in fixtures.state_of(name).items():
        if "weights_in" in key:
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                state[_in_memory(key).replace("weights_in", part)] = half
        else:
            state[_in_memory(key)] = tensor
    torch.save({"model": state, "step": 3}, tmp_path / "model.pth")
    assert tiny(name, tmp_path / "model.pth").identity == tiny(name, fixtures.write(tmp_path / "hub", name)).identity


def _as_directory(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder


def _as_file(folder: Path, state: dict[str, Tensor]) -> Path:
    return _as_directory(folder, state) / "model.safetensors"


def _as_pickle(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def _as_shards(folder: Path, state: dict[str, Tensor]) -> Path:
    """Queries, keys and values of a block lie in different shards."""
    files = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for number, file in enumerate(files):
        save_file({key: state[key] for key in list(state)[number::3]}, folder / file)
    places = {key: files[number % 3] for number, key in enumerate(state)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def _as_cache(folder: Path, state: dict[str, Tensor]) -> Path:
    """The Hub's cache: a snapshot of links to blobs."""
    snapshot = folder / "models--facebook--dinov2-tiny/snapshots/0123abcd"
    blob = snapshot.parents[1] / "blobs/9f86d081"
    for place in (snapshot, blob.parent):
        place.mkdir(parents=True)
    save_file(state, blob)
    (snapshot / "model.safetensors").symlink_to("../../blobs/9f86d081")
    return snapshot


@pytest.mark.parametrize("write", [_as_directory, _as_file, _as_pickle, _as_shards, _as_cache])
def test_forms_of_a_download(write: Callable[[Path, dict[str, Tensor]], Path], tmp_path: Path) -> None:
    name = "dinov3"
    expected = tiny(name, fixtures.write(tmp_path / "whole", name)).identity
    assert tiny(name, write(tmp_path, fixtures.state_of(name))).identity == expected


def test_the_folder_of_the_hubs_cache_names_its_snapshot(tmp_path: Path) -> None:
    snapshot = _as_cache(tmp_path, fixtures.state_of("dinov2"))
    with pytest.raises(UserError, match=f"give the snapshot in it that you mean, such as {snapshot}"):
        tiny("dinov2", snapshot.parents[1])


@pytest.mark.parametrize("prefix", ["dinov2.", "backbone.", "model.encoder."])
def test_a_model_around_it_is_left_out_and_told(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = fixtures.state_of("dinov2-reg")
    wrapped = {f"{prefix}{key}": tensor for key, tensor in state.items()}
    head = {"classifier.weight": torch.ones(2, 96), "classifier.bias": torch.ones(2)}
    path = _as_directory(tmp_path, wrapped | head)
    assert (
        tiny("dinov2-reg", path).identity
        == tiny("dinov2-reg", fixtures.write(tmp_path / "bare", "dinov2-reg")).identity
    )
    tiny("dinov2-reg", path)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"{path}: took the weights under {prefix.rstrip('.')!r}",
        f"{path}: left out classifier.bias, classifier.weight, which are no part of the teacher",
    ]


def test_a_model_that_was_made_without_a_mask_token(tmp_path: Path) -> None:
    for name in ("dinov2", "dinov2-reg", "dinov3"):
        expected = tiny(name, fixtures.write(tmp_path / name, name)).identity
        state = fixtures.state_of(name)
        del state["embeddings.mask_token"]
        assert tiny(name, fixtures.write(tmp_path / name, name, state)).identity == expected


def _biases(state: dict[str, Tensor], part: str, value: float) -> dict[str, Tensor]:
    keys = [f"layer.{number}.attention.{part}_proj" for number in range(2)]
    return {f"{key}.bias": torch.full((len(state[f"{key}.weight"]),), float(value)) for key in keys}


def test_biases_of_dinov3_are_not_lost(tmp_path: Path) -> None:
    """timm's models without a bias take those where it is zero; no model has one of keys."""
    plain = "vit_base_patch16_dinov3"
    state = fixtures.state_of("dinov3")
    with pytest.raises(UserError, match=f"these weights have a qkv bias; use the teacher {plain}_qkvb"):
        tiny("dinov3", fixtures.write(tmp_path, "dinov3"), plain)
    zeros = _biases(state, "q", 0) | _biases(state, "v", 0)
    path = fixtures.write(tmp_path, "dinov3", state | zeros)
    image = fixtures.image(16, GRIDS[0])
    without, with_zeros = (tiny("dinov3", path, name) for name in (plain, f"{plain}_qkvb"))
    torch.testing.assert_close(without.patch_features(image), with_zeros.patch_features(image))
    with_keys = tiny("dinov3", fixtures.write(tmp_path, "dinov3", state | _biases(state, "k", 0)))
    assert with_keys.identity == tiny("dinov3", fixtures.write(tmp_path, "dinov3")).identity
    with pytest.raises(UserError, match=r"layer\.0\.attention\.k_proj\.bias is not zero, but keys have no bias"):
        tiny("dinov3", fixtures.write(tmp_path, "dinov3", state | _biases(state, "k", 0.1)))


@pytest.mark.parametrize("name", ["dinov2-s", "dinov3-s"])
def test_published_models_of_random_weights(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = fixtures.shapes_of(name)
    state = {key: 0.02 * torch.randn(shape, dtype=torch.float16) for key, shape in shapes.items()}
    for key in state:
        if key.endswith(("q_proj.bias", "v_proj.bias")):  # as in the published files
            state[key].zero_()
    teacher = build_teacher(name, fixtures.write(tmp_path, name, state), grid_side=2)
    assert teacher.width == 384
    assert isinstance(teacher, TimmVit)
    qkv = teacher.model.blocks[11].attn.qkv.weight
    keys = next(key for key in state if "layer.11." in key and key.endswith(("key.weight", "k_proj.weight")))
    torch.testing.assert_close(qkv[384:768], state[keys].float())
    assert teacher.patch_features(torch.zeros(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("name", fixtures.PUBLISHED)
def test_every_published_model_fits_its_teacher(name: str) -> None:
    """Names, shapes and sizes, without the numbers."""
    shapes = fixtures.shapes_of(name)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    layout = transformers_layout.layout_of(state, name)
    facts, own = transformers_layout.facts_of_weights(state, layout, name), facts_of(TIMM_NAMES[name])
    assert own is not None
    assert differences(facts, own) == {}
    assert facts.keys() >= {"hidden_size", "num_hidden_layers", "patch_size", "num_register_tokens", "gated MLP"}
    authors = transformers_layout.to_authors(state, layout, name)
    for key in [key for key in authors if "storage_tokens" in authors and key.endswith("qkv.bias")]:
        del authors[key]
    model = TimmVit.outline(name, TIMM_NAMES[name]).model
    convert = timm.models.eva if name.startswith("dinov3") else timm.models.vision_transformer
    load_strict(model, convert.checkpoint_filter_fn(authors, model), name)
