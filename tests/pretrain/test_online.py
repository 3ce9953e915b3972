"""Tokens and features made online: the batches of precomputed sets, in the same order; and the loader's state."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mepa_ds.config.base import apply_overrides, validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.data.remote.remote_file import RemoteShards
from mepa_ds.data.shards.index import INDEX_NAME
from mepa_ds.data.training import TrainingBatch
from mepa_ds.data_tools.build_shards import BuildOptions, Encoding, build
from mepa_ds.data_tools.precompute import Features, FitTeacher, Tokens
from mepa_ds.data_tools.readers.digits import Digits
from mepa_ds.errors import UserError
from mepa_ds.pretrain.data import Loader, data_identity, open_checked, stream_of
from mepa_ds.tokenizer.tokenizer import Tokenizer
from tests.ranks import finish
from tests.tiny_run import losses, recipe_values, write_recipe

CODES = {"scales": [1, 2, 4], "codebook_size": 16, "code_width": 4, "num_classes": 10}
SHARED = [f"model.{name}={json.dumps(value)}" for name, value in CODES.items()]
PRECOMPUTED = ["data.tokens={}/tokens", "data.features={}/features", "data.heldout_tokens={}/tokens"]
ONLINE = [
    "data.tokens=null",
    "data.features=null",
    "data.images={}/images",
    "data.teacher.name=patch-pca",
    "data.teacher.weights={}/teacher",
    "data.heldout_tokens={}/tokens",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, their tokens and features, and the two networks."""
    root = tmp_path_factory.mktemp("online")
    build(Digits("heldout", side=16), BuildOptions(root / "images", Encoding(), shard_samples=100, workers=0))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"channels": 32, "channel_multipliers": (1, 1, 1), "num_res_blocks": 1, "attention": False}
    config = TokenizerConfig(scales=(1, 2, 4), codebook_size=16, code_width=4, **sizes)
    Tokenizer(config).save_pretrained(root / "tokenizer")
    Tokens(root / "images", root / "tokenizer", out=root / "tokens")()
    FitTeacher("patch-pca", root / "images", root / "teacher", grid_side=4, pixels_per_cell=4, window=8, width=6)()
    Features(root / "images", "patch-pca", str(root / "teacher"), codec="fp16", out=root / "features")()
    return root


def overrides(folder: Path, kind: list[str]) -> list[str]:
    return [*SHARED, *(text.format(folder) for text in kind)]


def config_of(folder: Path, kind: list[str], *more: str) -> PretrainConfig:
    values = apply_overrides(recipe_values(folder), [*overrides(folder, kind), *more])
    return validate(PretrainConfig, values, "recipe")


def batches(config: PretrainConfig, count: int, position: int = 0) -> list[TrainingBatch]:
    return list(itertools.islice(Loader(stream_of(config, open_checked(config)), position), count))


def test_a_subset_has_the_same_images_online(folder: Path) -> None:
    """Twelve images of all, sixteen in two batches."""
    kinds = [batches(config_of(folder, kind, "data.unique_images=12"), 2) for kind in (PRECOMPUTED, ONLINE)]
    for ours, theirs in zip(*kinds, strict=True):
        assert_same(ours, theirs)
    keys = [key for batch in kinds[1] for key in batch.keys]
    assert len(set(keys[:12])) == 12 == len(set(keys))
    config = config_of(folder, ONLINE, "data.unique_images=12")
    assert open_checked(config).num_samples == 12
    assert data_identity(config, open_checked(config))["data.unique_images"] == "12"
    with pytest.raises(UserError, match=r"data\.unique_images: 99999, but data\.images .* samples; give at most"):
        open_checked(config_of(folder, ONLINE, "data.unique_images=99999"))


def assert_same(ours: TrainingBatch, theirs: TrainingBatch) -> None:
    for name in ("tokens_BL", "labels_B", "weight_B", "positions_B"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert (ours.keys, ours.next_position) == (theirs.keys, theirs.next_position)
    assert ours.features_BNC is not None
    assert theirs.features_BNC is not None
    # The teacher sees other batches than it did then, which rounds otherwise: one step of fp16 at most.
    torch.testing.assert_close(ours.features_BNC, theirs.features_BNC, rtol=2**-10, atol=1e-4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_online_batches_are_the_precomputed_ones(folder: Path, num_workers: int) -> None:
    """More than one epoch, two micro-batches a step, from the start and from the middle."""
    shape = ["train.global_batch=46", "train.accumulation=2", f"data.num_workers={num_workers}"]
    ours = batches(config_of(folder, ONLINE, *shape), 15)
    theirs = batches(config_of(folder, PRECOMPUTED, *shape), 15)
    for online, precomputed in zip(ours, theirs, strict=True):
        assert_same(online, precomputed)
    position = ours[4].next_position
    for resumed, straight in zip(batches(config_of(folder, ONLINE, *shape), 2, position), ours[5:], strict=False):
        assert_same(resumed, straight)


def test_ranks_share_what_one_process_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder, ONLINE)
    whole, sets = batches(config, 3), open_checked(config)
    monkeypatch.setattr("mepa_ds.distributed.world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("mepa_ds.distributed.rank", lambda rank=rank: rank)
        parts.append(list(itertools.islice(Loader(stream_of(config, sets), 0), 3)))
    for first, second, both in zip(*parts, whole, strict=True):
        assert first.keys + second.keys == both.keys
        assert torch.equal(torch.cat([first.positions_B, second.positions_B]), both.positions_B)
        assert torch.equal(torch.cat([first.tokens_BL, second.tokens_BL]), both.tokens_BL)


@pytest.mark.parametrize("kind", [ONLINE, PRECOMPUTED])
def test_a_loader_goes_on_from_its_state(folder: Path, kind: list[str]) -> None:
    config = config_of(folder, kind)
    sets = open_checked(config)
    loader = Loader(stream_of(config, sets), 0)
    for _ in range(3):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state == {"position": 24}
    following = next(loader)
    loader.load_state_dict(state)
    assert_same(next(loader), following)
    other = Loader(stream_of(config, sets), 0)
    other.load_state_dict(state)
    assert_same(next(other), following)


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(message: str, *more: str, kind: list[str] = ONLINE) -> None:
        with pytest.raises(UserError, match=message):
            batches(config_of(folder, kind, *more), 1)

    refused("data: give one of tokens .* and images", f"data.tokens={folder}/tokens")
    refused(r"data\.features: belong to data\.tokens", f"data.features={folder}/features")
    teacher = ["data.teacher.name=patch-pca", "data.teacher.weights=x"]
    refused(r"data\.teacher: runs on data\.images", *teacher, kind=PRECOMPUTED)
    refused(r"needs teacher features: set data\.teacher", "data.teacher=null")
    refused("holds tokens; set data.tokens to it", f"data.images={folder}/tokens")
    refused(r"model\.num_classes: 7, but data\.images .* has 10 classes", "model.num_classes=7")
    refused(r"model\.codebook_size: 17, but tokenizer: .* has 16", "model.codebook_size=17")
    refused("teacher 'dinov9' is unknown", "data.teacher.name=dinov9")
    bare = shutil.copytree(folder / "images", tmp_path / "images")
    index = json.loads((bare / INDEX_NAME).read_text())
    (bare / INDEX_NAME).write_text(json.dumps({**index, "classes": []}))
    few = ["model.num_classes=3", f"data.images={bare}", "data.heldout_tokens=null"]
    refused(r"sample '\d+' has label [3-9], but the model's classes are 0 to 2", *few)


def test_the_window_of_remote_sets_is_part_of_a_runs_identity(folder: Path, tmp_path: Path) -> None:
    """Another window is another order: a run must not go on in it."""
    far = shutil.copytree(folder / "tokens", tmp_path / "tokens")
    identities = []
    for window in (None, 1, 2):
        if window is not None:
            count = len(list(far.glob("*.tar")))
            RemoteShards(urls=("pipe:x",) * count, cache=str(tmp_path), cache_gigabytes=1, window=window).write(far)
        word = "data.remote_schemes=[pipe]"
        config = config_of(folder, PRECOMPUTED, f"data.tokens={far}", "objective.alignment=null", word)
        identities.append(data_identity(config, open_checked(config)))
    assert "data.window" not in identities[0]
    assert identities[1]["data.window"] == "1 shards (remote.json)"
    assert len({json.dumps(identity) for identity in identities}) == 3


def test_a_run_online_is_the_precomputed_run(folder: Path) -> None:
    """Whole runs with guidance: one process on precomputed sets, two ranks in two legs online."""
    recipe, log = write_recipe(folder), folder / "online.log"
    common = ["log.checkpoint_every=3", "data.num_workers=0", "optim.schedule=constant", "optim.warmup=0"]
    precomputed, online = folder / "run_precomputed", folder / "run_online"
    arguments = [*overrides(folder, PRECOMPUTED), *common, "train.steps=6", f"output_dir={precomputed}"]
    finish([str(recipe), *arguments], 1, log)
    for steps in (3, 6):
        arguments = [*overrides(folder, ONLINE), *common, f"train.steps={steps}", f"output_dir={online}"]
        finish([str(recipe), *arguments], 2, log)
    np.testing.assert_allclose(losses(online), losses(precomputed), rtol=1e-4)
