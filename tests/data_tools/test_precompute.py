"""The precompute tool: what it writes against tokenizer and teacher run by hand, parts, resuming, kills, bad input."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.data.codecs import BASIS_NAME, FEATURES_EXT, SCALE_EXT, FeatureDecoder, PcaBasis, codec_named
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import ShardIndex
from mepa_ds.data.training import training_batches
from mepa_ds.data.training_sets import open_training_sets
from mepa_ds.data.views import BOX_EXT, Views, sample_boxes
from mepa_ds.data_tools import precompute
from mepa_ds.data_tools.precompute import Features, FitTeacher, Tokens
from mepa_ds.data_tools.precompute_sets import RunOptions
from mepa_ds.errors import UserError
from mepa_ds.teachers.patch_pca import PatchPca
from mepa_ds.teachers.registry import build_teacher
from mepa_ds.tokenizer.tokenizer import Tokenizer
from tests.data_tools.precompute_fixtures import SHARD_SIZES, SIDE, picture, write_images

RUN = RunOptions(batch_size=4, workers=2)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("weights") / "tiny"
    config = TokenizerConfig(
        scales=(1, 2, 4), codebook_size=64, code_width=8, channels=32, channel_multipliers=(1, 1, 2), num_res_blocks=1
    )
    Tokenizer(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("weights") / "teacher"
    FitTeacher("patch-pca", write_images(tmp_path_factory.mktemp("fit") / "images"), directory, 4, 4, 8, 12)()
    return directory


def as_tensor(pixels: Any) -> Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 127.5 - 1


def array(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_tokens_against_the_tokenizer(images: Path, tokenizer: Path) -> None:
    Tokens(images, tokenizer, run=RUN)()
    made, source = ShardSet(images.with_name("images.tokens-tiny")), ShardSet(images)
    reference = Tokenizer.load(tokenizer)
    assert [shard.name for shard in made.index.shards] == [shard.name for shard in source.index.shards]
    assert made.index.keys_sha256 == source.index.keys_sha256
    for number in range(sum(SHARD_SIZES)):
        key, members = made.read(number)
        tokens = array(members["tokens.npy"])
        assert (key, members["cls"], tokens.dtype) == (f"n{number:04d}", str(number % 2).encode(), np.uint16)
        expected = reference.encode(as_tensor(picture(number)))[0]
        np.testing.assert_array_equal(tokens, expected.numpy())
    assert made.index.made_by.identity == reference.identity
    settings = made.index.made_by.settings
    assert (settings["scales"], settings["codebook_size"], settings["views"]) == ([1, 2, 4], 64, "centre")


@pytest.mark.parametrize("codec", ["int8", "fp16", "pca6-int8"])
def test_features_against_the_teacher(images: Path, teacher: Path, codec: str) -> None:
    Features(images, "patch-pca", str(teacher), codec=codec, run=RUN)()
    out = images.with_name("images.features-patch-pca")
    made, reference = ShardSet(out), PatchPca.load(teacher)
    basis = PcaBasis.load(out / BASIS_NAME) if codec.startswith("pca") else None
    named = codec_named(codec, basis)
    decoder = FeatureDecoder(named)
    for number in range(sum(SHARD_SIZES)):
        _, members = made.read(number)
        assert set(members) == set(named.extensions)
        decoded = decoder(*(torch.from_numpy(array(members[ext])) for ext in named.extensions))
        expected = reference.patch_features(as_tensor(picture(number)))[0]
        stored_again = named.encode(expected)
        again = decoder(*(stored_again[ext] for ext in named.extensions))
        torch.testing.assert_close(decoded, again, rtol=0, atol=0.02 * float(expected.abs().max()))
        cosine = torch.nn.functional.cosine_similarity(decoded, expected, dim=-1).mean()
        assert cosine > (0.6 if basis else 0.999)  # 6 of 12 whitened components keep about sqrt(1/2)


def test_features_and_cls_of_a_vit(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    save_file(model.state_dict(), tmp_path / "test_vit.safetensors")
    weights = str(tmp_path / "test_vit.safetensors")
    Features(images, "test_vit", weights, codec="fp16", grid_side=2, cls=True, run=RUN)()
    made = ShardSet(images.with_name("images.features-test_vit"))
    reference = build_teacher("test_vit", weights, grid_side=2)
    assert made.index.made_by.identity == reference.identity
    for number in (0, 11):
        patches, cls = reference.features(as_tensor(picture(number)))
        assert cls is not None
        _, members = made.read(number)
        np.testing.assert_allclose(array(members[FEATURES_EXT]), patches[0].half().numpy(), rtol=1e-2, atol=1e-2)
        np.testing.assert_allclose(array(members["cls_token.npy"]), cls[0].half().numpy(), rtol=1e-2, atol=1e-2)


def test_what_it_writes_opens_for_training(images: Path, tokenizer: Path, teacher: Path) -> None:
    Tokens(images, tokenizer, run=RUN)()
    Features(images, "patch-pca", str(teacher), run=RUN)()
    sets = open_training_sets(images.with_name("images.tokens-tiny"), images.with_name("images.features-patch-pca"))
    assert (sets.scales, sets.codebook_size, sets.num_classes) == ((1, 2, 4), 64, 2)
    assert (sets.feature_width, sets.feature_grid_side) == (12, 4)


def test_random_views_of_tokens_and_features_are_the_same_crops(tmp_path: Path, tokenizer: Path, teacher: Path) -> None:
    images = write_images(tmp_path / "images", height=20, width=28)
    common: dict[str, Any] = {"views": "random:3", "views_seed": 5, "run": RUN}
    Tokens(images, tokenizer, **common)()
    Features(images, "patch-pca", str(teacher), codec="fp16", image_side=SIDE, **common)()
    tokens, features = ShardSet(tmp_path / "images.tokens-tiny"), ShardSet(tmp_path / "images.features-patch-pca")
    encoder, reference, views = Tokenizer.load(tokenizer), PatchPca.load(teacher), Views.parse("random:3", SIDE, 5)
    for number in (0, 9):
        crops, boxes = views.crop(picture(number, 20, 28), f"n{number:04d}")
        members = tokens.read(number)[1] | features.read(number)[1]
        np.testing.assert_array_equal(array(members[BOX_EXT]), boxes)
        for view, crop in enumerate(crops):
            np.testing.assert_array_equal(array(members["tokens.npy"])[view], encoder.encode(as_tensor(crop))[0])
            expected = reference.patch_features(as_tensor(crop))[0].half().numpy()
            np.testing.assert_allclose(array(members[FEATURES_EXT])[view], expected, atol=1e-3)
    assert tokens.index.members["tokens.npy"].shape == (3, 21)
    assert features.index.members[FEATURES_EXT].shape == (3, 16, 12)


def test_features_of_whole_images(tmp_path: Path, teacher: Path) -> None:
    images = write_images(tmp_path / "images", height=20, width=28)
    Features(images, "patch-pca", str(teacher), views="whole", run=RUN)()
    made = ShardSet(tmp_path / "images.features-patch-pca")
    rows, columns = round(4 * 1.125), round(4 * 1.125 * 28 / 20)
    assert made.index.members[FEATURES_EXT].shape == (rows, columns, 12)
    _, members = made.read(3)
    decoder = FeatureDecoder(codec_named("int8"))
    decoded = decoder(torch.from_numpy(array(members[FEATURES_EXT])), torch.from_numpy(array(members[SCALE_EXT])))
    expected = PatchPca.load(teacher).patch_features(as_tensor(picture(3, 20, 28)), (rows, columns))[0]
    assert torch.nn.functional.cosine_similarity(decoded.flatten(0, 1), expected, dim=-1).mean() > 0.999


@pytest.mark.parametrize("feature_views", ["random:3", "whole"])
def test_the_loader_pairs_a_view_s_tokens_with_its_features(
    tmp_path: Path, tokenizer: Path, teacher: Path, feature_views: str
) -> None:
    """Over a few epochs: each batch's tokens are those of one crop, its features those of the same crop."""
    images = write_images(tmp_path / "images", height=20, width=28)
    tokens, features = tmp_path / "tokens", tmp_path / "features"
    Tokens(images, tokenizer, views="random:3", out=tokens, run=RUN)()
    side = None if feature_views == "whole" else SIDE
    arguments: dict[str, Any] = {"views": feature_views, "image_side": side, "out": features, "run": RUN}
    Features(images, "patch-pca", str(teacher), **arguments)()
    encoder, reference, views = Tokenizer.load(tokenizer), PatchPca.load(teacher), Views.parse("random:3", SIDE)
    seen = set()
    for _, batch in zip(range(12), training_batches(tokens, features, global_batch=6, seed=3), strict=False):
        features_BNC = batch.features_BNC
        assert features_BNC is not None
        for key, tokens_L, features_NC in zip(batch.keys, batch.tokens_BL, features_BNC, strict=True):
            image = picture(int(key[1:]), 20, 28)
            crops, boxes = views.crop(image, key)
            codes = [encoder.encode(as_tensor(crop))[0] for crop in crops]
            matching = [view for view in range(3) if torch.equal(codes[view], tokens_L)]
            assert matching, f"{key}: the tokens are of no view"
            if feature_views == "whole":
                whole = reference.patch_features(as_tensor(image), (4, 6)).unflatten(1, (4, 6))
                choices = sample_boxes(whole.expand(3, -1, -1, -1), torch.from_numpy(boxes), 4)
            else:
                choices = torch.cat([reference.patch_features(as_tensor(crop)) for crop in crops])
            cosines = torch.nn.functional.cosine_similarity(choices, features_NC[None], dim=-1).mean(dim=1)
            assert any(cosines[view] > 0.999 for view in matching)
            seen.add((key, matching[0]))
    assert len({view for _, view in seen}) == 3


def test_parts_of_a_job_array_make_the_same_set(images: Path, tokenizer: Path, capsys: Any) -> None:
    whole, parts = images.with_name("whole"), images.with_name("parts")
    Tokens(images, tokenizer, out=whole, run=RUN)()
    for part in (1, 0):
        assert not (parts / "index.json").exists()
        Tokens(images, tokenizer, out=parts, run=RunOptions(4, 0, num_parts=2, part=part))()
    assert "2 shards are missing" in capsys.readouterr().out
    assert content(parts) == content(whole)


def test_ranks_of_torchrun_share_the_shards(images: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, together = images.with_name("alone"), images.with_name("together")
    features: dict[str, Any] = {"codec": "pca6-int8", "run": RUN}
    Features(images, "patch-pca", str(teacher), out=alone, **features)()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        Features(images, "patch-pca", str(teacher), out=together, **features)()
    assert content(together) == content(alone)


def test_a_finished_set_is_kept_and_lost_shards_are_made_again(images: Path, tokenizer: Path, capsys: Any) -> None:
    out = images.with_name("out")
    Tokens(images, tokenizer, out=out, run=RUN)()
    before = content(out)
    (out / "shard-000001.tar").write_bytes(b"torn")
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    Tokens(images, tokenizer, out=out, run=RUN)()
    assert "2 of 3 shards are there already" in capsys.readouterr().out
    assert content(out) == before
    assert (out / "shard-000000.tar").stat().st_mtime_ns == stamps["shard-000000.tar"]


KILLED_AT_A_RENAME = """
import os, signal, sys
from mepa_ds.data_tools import precompute

left, rename = int(sys.argv.pop()), os.replace

def rename_or_die(source, target):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.replace = rename_or_die
precompute.main()
"""


@pytest.mark.processes
@pytest.mark.parametrize("kill_at", [3, 4, 8])
def test_killed_and_run_again_ends_byte_identical(images: Path, tokenizer: Path, kill_at: int) -> None:
    """Renames: 1 the manifest; 2, 4, 6 a tar; 3, 5, 7 its offset index; 8 the index."""
    undisturbed, killed = images.with_name("undisturbed"), images.with_name("killed")
    Tokens(images, tokenizer, out=undisturbed, run=RunOptions(4, 0))()
    arguments = ["tokens", str(images), "--tokenizer", str(tokenizer), "--batch-size", "4", "--out", str(killed)]
    command = [sys.executable, "-c", KILLED_AT_A_RENAME, *arguments, str(kill_at)]
    run = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=100)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert not (killed / "index.json").exists()
    assert len(list(killed.glob("shard-*.npz"))) == (kill_at - 2) // 2
    Tokens(images, tokenizer, out=killed, run=RunOptions(4, 0))()
    assert content(killed) == content(undisturbed)


def test_a_damaged_image_is_named_and_finished_shards_stay(tmp_path: Path, tokenizer: Path) -> None:
    images = write_images(tmp_path / "images", damaged=8)
    with pytest.raises(UserError, match=r"sample 'n0008': not a readable image.*mepa data build webdataset .*skip"):
        Tokens(images, tokenizer, out=tmp_path / "out", run=RUN)()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "index.plan.json",
        "shard-000000.idx.npz",
        "shard-000000.tar",
    ]


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ({}, {"codec": "fp16"}, r"codec 'int8' there, 'fp16' now"),
        ({"codec": "pca6-int8"}, {"codec": "pca5-int8"}, r"codec 'pca6-int8' there, 'pca5-int8' now"),
        ({}, {"views": "random:2", "image_side": SIDE}, r"views 'centre' there, 'random:2' now"),
    ],
)
def test_a_set_made_otherwise_is_not_touched(
    images: Path, teacher: Path, first: dict[str, Any], second: dict[str, Any], named: str
) -> None:
    Features(images, "patch-pca", str(teacher), run=RUN, **first)()
    before = content(images.with_name("images.features-patch-pca"))
    with pytest.raises(UserError, match=named):
        Features(images, "patch-pca", str(teacher), run=RUN, **second)()
    assert content(images.with_name("images.features-patch-pca")) == before


def test_tokens_of_another_tokenizer_are_not_mixed_in(images: Path, tokenizer: Path, tmp_path: Path) -> None:
    Tokens(images, tokenizer, run=RUN)()
    other = tmp_path / "other" / tokenizer.name
    torch.manual_seed(1)
    Tokenizer(Tokenizer.load(tokenizer).config).save_pretrained(other)
    with pytest.raises(UserError, match=r"made with other settings \(made_by\.identity"):
        Tokens(images, other, run=RUN)()


def test_images_with_other_labels_are_other_images(images: Path, tokenizer: Path, teacher: Path) -> None:
    """Their keys and sizes are the same, so that tokens with the old labels would be kept."""
    Tokens(images, tokenizer, run=RUN)()
    shutil.rmtree(images)
    write_images(images, first_label=1)
    with pytest.raises(UserError, match=r"made with other settings \(made_by\.settings\.images"):
        Tokens(images, tokenizer, run=RUN)()
    features = images.with_name("images.features-patch-pca")
    Features(images, "patch-pca", str(teacher), run=RUN)()
    with pytest.raises(UserError, match="are not made from the same images in the same order"):
        open_training_sets(images.with_name(f"images.tokens-{tokenizer.name}"), features)


def test_a_basis_of_another_teacher_is_refused(images: Path, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    PcaBasis(torch.zeros(12), torch.eye(12)[:6], teacher="another").save(out / BASIS_NAME)
    with pytest.raises(UserError, match="fitted on another teacher's features; remove it"):
        Features(images, "patch-pca", str(teacher), codec="pca6-int8", out=out, run=RUN)()


def test_a_lost_basis_is_not_replaced(images: Path, teacher: Path, tmp_path: Path) -> None:
    command = Features(images, "patch-pca", str(teacher), codec="pca6-int8", out=tmp_path / "out", run=RUN)
    command()
    command()
    (tmp_path / "out" / BASIS_NAME).unlink()
    with pytest.raises(UserError, match="lost, and the shards cannot be read without it"):
        command()


def test_fitting_again_keeps_the_teacher_or_says_what_differs(images: Path, tmp_path: Path, capsys: Any) -> None:
    FitTeacher("patch-pca", images, tmp_path / "teacher", 4, 4, 8, 12)()
    before = content(tmp_path / "teacher")
    FitTeacher("patch-pca", images, tmp_path / "teacher", 4, 4, 8, 12)()
    assert "fitted already, kept" in capsys.readouterr().out
    assert content(tmp_path / "teacher") == before
    with pytest.raises(UserError, match="holds a teacher fitted otherwise"):
        FitTeacher("patch-pca", images, tmp_path / "teacher", 4, 4, 8, 10)()


def test_bad_input(images: Path, tokenizer: Path, teacher: Path, tmp_path: Path) -> None:
    weights = str(teacher)
    Tokens(images, tokenizer, run=RUN)()
    cases: list[tuple[Any, str]] = [
        (Tokens(tmp_path / "none", tokenizer), "no such directory"),
        (Tokens(images, tmp_path / "none"), "--tokenizer: .*no such file"),
        (Tokens(images.with_name("images.tokens-tiny"), tokenizer), "holds tokens; give the image set"),
        (Tokens(images, tokenizer, views="middle"), "neither 'centre' nor random:K"),
        (Tokens(images, tokenizer, run=RunOptions(num_parts=2, part=2)), "--part: expected 0 to 1, got 2"),
        (Tokens(images, tokenizer, run=RunOptions(batch_size=0)), "--batch-size: expected at least 1"),
        (Features(images, "patch-pcs", weights), "did you mean patch-pca"),
        (Features(images, "patch-pca", weights, codec="int4"), "codec 'int4' is unknown"),
        (Features(images, "patch-pca", weights, cls=True), "has no CLS token"),
        (Features(images, "patch-pca", weights, views="random:2"), "give the tokenizer's image side"),
        (Features(images, "patch-pca", weights, codec="pca13-int8"), "13 components asked"),
        (FitTeacher("patch-pca", images, tmp_path / "t", 4, 4, 7, 12), "window"),
    ]
    for command, message in cases:
        with pytest.raises(UserError, match=message):
            command()


def test_oblong_images_need_a_side(tmp_path: Path, teacher: Path) -> None:
    images = write_images(tmp_path / "images", height=20, width=28)
    with pytest.raises(UserError, match="28 x 20 pixels, no square; give with --image-side"):
        Features(images, "patch-pca", str(teacher))()


def test_command_line(images: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    arguments = ["tokens", str(images), "--tokenizer", str(tokenizer), "--batch-size", "8"]
    monkeypatch.setattr(sys, "argv", ["precompute.py", *arguments])
    precompute.main()
    assert "images.tokens-tiny: 18 samples in 3 shards" in capsys.readouterr().out
    assert ShardIndex.read(images.with_name("images.tokens-tiny")).num_samples == 18
