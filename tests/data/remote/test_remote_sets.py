"""Remote sets: the same samples as from local files."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mepa_ds.data.images import image_batches
from mepa_ds.data.options import LoaderOptions
from mepa_ds.data.order import SampleOrder
from mepa_ds.data.remote import fetching
from mepa_ds.data.remote.remote_file import REMOTE_NAME
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import INDEX_NAME, MadeBy, ShardIndex
from mepa_ds.data.shards.writer import Manifest, ShardWriter, npy_bytes
from mepa_ds.data.training import training_batches
from mepa_ds.data_tools.merge_index import CacheOptions, Remote, Scan
from mepa_ds.errors import DamagedError, UserError
from tests.data.shard_fixtures import features_of, make_set, tokens_of

SIZES = (3, 4, 2, 5, 3, 4)
SHARD_BYTES = 20_480  # the largest shard of tokens


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_PAUSE_SECONDS", 0.0)


def make_remote(tmp_path: Path, kind: str, cache_bytes: int = 10**9, window: int = 2, name: str = "r") -> Path:
    index = make_set(tmp_path / "far" / kind, kind, SIZES)
    assert kind != "tokens" or max(shard.bytes for shard in index.shards) == SHARD_BYTES
    options = CacheOptions(str(tmp_path / "cache"), cache_bytes / 1e9, window)
    out = tmp_path / f"{name}-{kind}"
    Remote(f"pipe:cat {tmp_path / 'far' / kind}/{{}}", out, options)()
    return out


def test_the_same_samples_from_afar(tmp_path: Path) -> None:
    near, far = tmp_path / "far" / "tokens", make_remote(tmp_path, "tokens")
    ours, theirs = ShardSet(near), ShardSet(far)
    assert ours.index == theirs.index
    for number in range(len(ours)):
        assert theirs.read(number) == ours.read(number)


def test_training_reads_remote_sets_window_by_window(tmp_path: Path) -> None:
    tokens, features = make_remote(tmp_path, "tokens"), make_remote(tmp_path, "features")
    batches = list(
        itertools.islice(
            training_batches(tokens, features, global_batch=3, seed=4, options=LoaderOptions(num_workers=2)), 14
        )
    )
    expected = [SampleOrder(SIZES, 4, window=2).epoch(epoch).tolist() for epoch in range(2)]
    assert [int(key) for batch in batches for key in batch.keys] == [*expected[0], *expected[1]]
    for batch in batches:
        numbers = [int(key) for key in batch.keys]
        assert batch.tokens_BL.tolist() == [tokens_of(number).tolist() for number in numbers]
        assert batch.features_BNC is not None
        np.testing.assert_array_equal(batch.features_BNC.numpy(), [features_of(n) * np.float32(0.5) for n in numbers])


def test_images_are_fetched_by_worker_processes_too(tmp_path: Path) -> None:
    images = make_remote(tmp_path, "images")
    options: dict[str, Any] = {"batch_size": 3, "image_side": 8, "seed": 1}
    keys = [b.keys for b in itertools.islice(image_batches(images, **options, options=LoaderOptions(num_workers=2)), 7)]
    assert sorted(itertools.chain(*keys)) == [f"{number:09d}" for number in range(21)]
    assert keys == [b.keys for b in itertools.islice(image_batches(images, **options), 7)]


def test_shards_of_any_name_leave_the_cache(tmp_path: Path) -> None:
    """Those that others made end in what they like."""
    make_set(tmp_path / "far", "images", SIZES)
    for number in range(len(SIZES)):
        (tmp_path / "far" / f"shard-{number:06d}.tar").rename(tmp_path / "far" / f"{number}.tar.old?download=true")
    largest = max(path.stat().st_size for path in (tmp_path / "far").glob("*.tar*"))
    cache = CacheOptions(str(tmp_path / "cache"), 3 * largest / 1e9, 1)
    Scan(f"pipe:cat '{tmp_path}/far/{{0..5}}.tar.old?download=true'", tmp_path / "near", None, 0, cache)()
    shards = ShardSet(tmp_path / "near")
    assert [shard.name for shard in shards.index.shards] == [f"{number}.tar.old" for number in range(6)]
    assert shards.cache is not None
    for number in range(21):
        shards.read(number)
        held = sum(path.stat().st_size for path in shards.cache.directory.glob("*.old"))
        assert 0 < held <= 3 * largest


def test_what_cannot_be_fetched_is_named(tmp_path: Path) -> None:
    tokens = make_remote(tmp_path, "tokens")
    (tmp_path / "far" / "tokens" / "shard-000001.tar").unlink()
    with pytest.raises(DamagedError, match=r"shard-000001\.tar: cannot be fetched"):
        ShardSet(tokens).read(4)
    assert ShardSet(tokens).read(0)[0] == "000000000"
    skipping = training_batches(tokens, None, global_batch=21, seed=0, options=LoaderOptions(on_damaged="skip"))
    assert len(next(skipping).damaged) >= 4


@pytest.mark.parametrize("option", [{"cache_gigabytes": 0.0}, {"window": 0}, {"window": -1}])
def test_windows_and_caches_of_nothing_are_refused(tmp_path: Path, option: dict[str, float]) -> None:
    tokens = make_remote(tmp_path, "tokens")
    content = json.loads((tokens / "remote.json").read_text())
    (tokens / "remote.json").write_text(json.dumps(content | option))
    with pytest.raises(UserError, match=rf"{next(iter(option))}: Input should be greater than 0"):
        ShardSet(tokens)


def test_bytes_that_changed_on_the_way_are_refused(tmp_path: Path) -> None:
    tokens = make_remote(tmp_path, "tokens")
    path = tmp_path / "far" / "tokens" / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedError, match="SHA-256 differs"):
        ShardSet(tokens).read(0)


def test_a_garbled_remote_json_is_named(tmp_path: Path) -> None:
    tokens = make_remote(tmp_path, "tokens")
    (tokens / REMOTE_NAME).write_text("{")
    with pytest.raises(UserError, match=r"remote\.json: cannot be read: .*; write it again, by `mepa data remote`"):
        ShardSet(tokens)


def test_over_http(tmp_path: Path, server: str) -> None:
    make_set(tmp_path / "far" / "tokens", "tokens", SIZES)
    out = tmp_path / "near"
    Remote(f"{server}/tokens/", out, CacheOptions(str(tmp_path / "cache")))()
    assert ShardSet(out).read(7) == ShardSet(tmp_path / "far" / "tokens").read(7)


def test_a_set_made_anew_at_the_same_place_is_fetched_anew(tmp_path: Path) -> None:
    """Same URLs, same keys, other content: neither old shards from the cache nor old offsets are used."""
    make_remote(tmp_path, "tokens")
    assert ShardSet(tmp_path / "r-tokens").read(1)[1]["cls"] == b"1"
    far = tmp_path / "far" / "tokens"
    names = tuple(shard.name for shard in ShardIndex.read(far).shards)
    shutil.rmtree(far)
    writer = ShardWriter(far, Manifest(kind="tokens", shard_names=names, made_by=MadeBy(name="new")))
    for number, name in enumerate(names):
        members = {"note": b"x" * 5000, "tokens.npy": npy_bytes(tokens_of(number)), "cls": b"7"}
        writer.write_shard(name, [(f"{number:09d}", members)])
    writer.finish()
    Remote(f"pipe:cat {far}/{{}}", tmp_path / "r-tokens", CacheOptions(str(tmp_path / "cache"), 1, 2))()
    renewed = ShardSet(tmp_path / "r-tokens")
    assert [renewed.read(number)[1]["cls"] for number in range(len(renewed))] == [b"7"] * len(names)


def test_names_in_an_index_cannot_leave_its_directory(tmp_path: Path) -> None:
    make_set(tmp_path, "tokens", [1])
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["shards"][0]["name"] = "../shard-000000.tar"
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"shards\.0\.name"):
        ShardSet(tmp_path)
    assert not (tmp_path / REMOTE_NAME).exists()
