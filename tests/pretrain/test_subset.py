"""data.unique_images: a run on a part of its set, drawn once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mepa_ds.config.base import load_config
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.order import subset_of
from mepa_ds.data.remote.remote_file import RemoteShards
from mepa_ds.data.shards.index import MadeBy, ShardIndex
from mepa_ds.data.shards.writer import npy_bytes
from mepa_ds.errors import UserError
from mepa_ds.pretrain.data import check_made_sets, data_identity, open_sets
from mepa_ds.runtime.metrics import read_metrics
from tests.ranks import arguments, finish, refused
from tests.reference import epoch_order, read_samples
from tests.tiny_run import make_run, write_set

SEED, UNIQUE, TOTAL = 3, 12, 40
SETTINGS = [f"seed={SEED}", "train.steps=null", "train.epochs=4", "model.class_dropout=0.3", "model.drop_path=0.2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subset")
    make_run(folder, *SETTINGS)
    return folder


def copy_of_samples(folder: Path, numbers: list[int]) -> list[str]:
    """Sets that have only these samples; overrides for them."""
    members = {"tokens": ("tokens.npy", "cls"), "features": ("features.npy",)}
    for kind, names in members.items():
        samples = read_samples(folder / f"train.{kind}")
        made_by = ShardIndex.read(folder / f"train.{kind}").made_by
        kept: list[dict[str, bytes]] = []
        for number in numbers:
            sample = samples[number]
            kept.append({n: str(int(sample[n])).encode() if n == "cls" else npy_bytes(sample[n]) for n in names})
        write_set(folder / f"part.{kind}", kind, MadeBy.model_validate(made_by.model_dump()), kept, per_shard=5)  # type: ignore[arg-type]
    return [f"data.{kind}={folder}/part.{kind}" for kind in members]


def trained(folder: Path, name: str) -> list[dict[str, Any]]:
    keys = ("step", "loss", "ce", "alignment", "balance", "grad_norm", "lr", "epoch")
    records = [record for record in read_metrics(folder / name / "metrics.jsonl") if record["event"] == "train"]
    return [{key: record[key] for key in keys} for record in records]


def test_a_run_on_a_subset_is_one_on_a_set_of_these_images(folder: Path) -> None:
    """Bit by bit: four epochs of a step and a half each."""
    numbers = subset_of(SEED, TOTAL, UNIQUE).tolist()
    finish(arguments(folder, "subset", f"data.unique_images={UNIQUE}"), 2, folder / "subset.log")
    finish(arguments(folder, "alone", *copy_of_samples(folder, numbers)), 2, folder / "alone.log")
    assert trained(folder, "subset") == trained(folder, "alone")
    start = next(iter(read_metrics(folder / "subset/metrics.jsonl")))
    assert (start["num_samples"], start["num_steps"]) == (UNIQUE, 4 * UNIQUE // 8)
    assert trained(folder, "subset")[-1]["epoch"] == 4


def test_another_subset_is_other_data(folder: Path) -> None:
    settings = [f"data.unique_images={UNIQUE}", "train.epochs=null", "train.steps=2"]
    finish(arguments(folder, "first", *settings), 1, folder / "first.log")
    said = refused(folder, "first", *settings, "train.steps=4", "data.unique_images=13")
    assert "the checkpoint was trained on other data (data.unique_images: '12' there, '13' now)" in said
    assert "data.unique_images: '12' there, None now" in refused(folder, "first", *settings, "data.unique_images=null")


def test_the_whole_set_as_a_subset_is_the_whole_set() -> None:
    assert subset_of(SEED, TOTAL, TOTAL).tolist() == list(range(TOTAL))
    assert epoch_order(SEED, 0, TOTAL) != list(range(TOTAL))


def refused_alike(folder: Path, message: str, *overrides: str) -> None:
    config = load_config(PretrainConfig, folder / "recipe.yaml", overrides)
    for check in (check_made_sets, open_sets):
        with pytest.raises(UserError, match=message):
            check(config)


def test_more_images_than_there_are(folder: Path) -> None:
    refused_alike(
        folder,
        r"data\.unique_images: 41, but data\.tokens .*train\.tokens has 40 samples; give at most that many",
        "data.unique_images=41",
    )
    config = load_config(PretrainConfig, folder / "recipe.yaml", ["data.unique_images=40"])
    sets = open_sets(config)
    assert sets.num_samples == 40
    assert data_identity(config, sets)["data.unique_images"] == "40"


def test_sets_that_are_fetched_have_no_subsets(folder: Path) -> None:
    shutil.copytree(folder / "train.tokens", folder / "remote.tokens")
    urls = tuple(f"https://host/{path.name}" for path in sorted((folder / "train.tokens").glob("*.tar")))
    cache = str(folder / "cache")
    RemoteShards(urls=urls, cache=cache, cache_gigabytes=1.0, window=1).write(folder / "remote.tokens")
    message = r"data\.unique_images: 5: a set that is fetched \(remote\.json; .*copy its shards to a local directory"
    refused_alike(folder, message, "data.unique_images=5", f"data.tokens={folder}/remote.tokens")
