"""The cache of fetched shards: bounded, shared with others who remove what they like, on any disk."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mepa_ds.data.images import image_batches, images_once
from mepa_ds.data.options import LoaderOptions
from mepa_ds.data.order import SampleOrder
from mepa_ds.data.remote import shard_cache
from mepa_ds.data.remote.remote_file import RemoteShards
from mepa_ds.data.remote.shard_cache import ShardCache
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import MadeBy
from mepa_ds.data.shards.open_files import OpenFile
from mepa_ds.data.shards.writer import Manifest, ShardWriter
from mepa_ds.data.training import evaluation_batches, training_batches
from mepa_ds.data_tools.precompute_sets import Derivation, RunOptions, derive_set
from mepa_ds.errors import UserError
from tests.data.remote.cache_fixtures import (
    SHARD_BYTES,
    SIZES,
    cache_of,
    content,
    far,
    make_remote,
    no_waiting,
    num_fetches,
)
from tests.data.remote.test_shared_lock import forbid_flock

_no_waiting = pytest.fixture(autouse=True)(no_waiting)


def test_it_stays_within_its_bound(tmp_path: Path) -> None:
    shards = ShardSet(make_remote(tmp_path, cache_bytes=3 * SHARD_BYTES))
    assert shards.cache is not None
    for number in itertools.chain(range(21), range(21)):
        shards.read(number)
        held = sum(path.stat().st_size for path in shards.cache.directory.glob("*.tar"))
        assert 0 < held <= 3 * SHARD_BYTES
    assert len(shards._files) <= 2


def test_what_was_used_last_stays(tmp_path: Path) -> None:
    """Fetched first, but used again: the one that was not used since goes."""
    cache = cache_of(make_remote(tmp_path, cache_bytes=3 * SHARD_BYTES))
    paths = [cache.directory / f"shard-{shard:06d}.tar" for shard in range(3)]
    for age, shard in zip((300, 200, 100), range(3), strict=True):
        cache.open(shard)
        os.utime(paths[shard], (time.time() - age,) * 2)
    cache.open(0)
    for shard in (3, 4, 5):
        cache.open(shard)
    assert [path.exists() for path in paths[:2]] == [True, False]


def test_shards_are_fetched_ahead_in_the_order_of_use(tmp_path: Path) -> None:
    tokens = make_remote(tmp_path)
    batches = training_batches(tokens, None, global_batch=1, seed=4)
    next(batches)
    first_two = SampleOrder(SIZES, 4, window=1).windows(0)[:2]
    expected = {f"shard-{window[0]:06d}.tar" for window in first_two}
    deadline = time.monotonic() + 20
    while {path.name for path in cache_of(tokens).directory.glob("*.tar")} != expected:
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    tokens = make_remote(tmp_path, cache_bytes=3 * SHARD_BYTES, window=2)
    with pytest.raises(UserError, match=r"cache_gigabytes .* is less than three windows of 2 shards"):
        ShardSet(tokens)
    remote = RemoteShards(urls=("x://a",), cache="$NO_SUCH_VARIABLE/x", cache_gigabytes=1, window=1)
    with pytest.raises(UserError, match=r"remote\.json names 1 shards, the index 0; write them again"):
        ShardCache(remote, [], "shards")
    with pytest.raises(UserError, match="a variable that is not set"):
        ShardCache(remote, ShardSet(tmp_path / "far").index.shards[:1], "shards")


def test_a_shard_that_is_removed_as_soon_as_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another job with a full cache; before it is opened by who fetched it, and by who finds it there."""
    cache = cache_of(make_remote(tmp_path))
    fetch = shard_cache.fetch
    monkeypatch.setattr(shard_cache, "fetch", lambda url, path, *rest: [fetch(url, path, *rest), path.unlink()])
    for shard in range(3):
        assert content(cache.open(shard)) == far(tmp_path, shard)
    assert not list(cache.directory.glob("*.tar"))
    monkeypatch.setattr(shard_cache, "fetch", fetch)
    cache.open(0)

    class Removed(OpenFile):
        def __init__(self, path: str):
            if Path(path) == cache.directory / "shard-000000.tar" and num_fetches(tmp_path) == 4:
                os.unlink(path)
            super().__init__(path)

    monkeypatch.setattr(shard_cache, "OpenFile", Removed)
    assert content(cache.open(0)) == far(tmp_path, 0)
    assert num_fetches(tmp_path) == 5


def remove_all(directory: Path, until: threading.Event) -> None:
    """Another job, whose cache is always full."""
    while not until.wait(0.001):
        for path in directory.glob("*.tar"):
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_jobs_that_remove_each_others_shards(tmp_path: Path, num_workers: int) -> None:
    images = make_remote(tmp_path, "images")
    options: dict[str, Any] = {"batch_size": 3, "image_side": 8, "seed": 1}
    expected = [batch.keys for batch in itertools.islice(image_batches(images, **options), 14)]
    cache, over = cache_of(images), threading.Event()
    other = threading.Thread(target=remove_all, args=(cache.directory, over))
    other.start()
    try:
        batches = image_batches(images, **options, options=LoaderOptions(num_workers=num_workers))
        assert [batch.keys for batch in itertools.islice(batches, 14)] == expected
    finally:
        over.set()
        other.join()


def test_threads_share_a_cache_that_is_too_small_for_them(tmp_path: Path) -> None:
    tokens = make_remote(tmp_path, cache_bytes=3 * SHARD_BYTES)
    expected = [ShardSet(tmp_path / "far").read(number) for number in range(21)]
    failures: list[BaseException] = []

    def read(seed: int) -> None:
        try:
            shards = ShardSet(tokens)
            for number in SampleOrder((21,), seed).epoch(0).tolist():
                assert shards.read(number) == expected[number]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("without_flock", [False, True])
def test_processes_share_a_cache_without_fetching_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_flock: bool
) -> None:
    if without_flock:
        forbid_flock(monkeypatch, "EOPNOTSUPP")
    cache = cache_of(make_remote(tmp_path))
    shutil.copytree(tmp_path / "far", tmp_path / "copy")
    script = f"pipe:echo x >> {tmp_path}/log; sleep 0.2; cat {tmp_path}/copy/shard-000000.tar"
    cache._remote = cache._remote.model_copy(update={"urls": (script,) * len(SIZES)})
    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            status = 1
            try:
                status = int(content(cache.open(0)) != far(tmp_path, 0))
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert num_fetches(tmp_path) == 1


def test_a_copy_of_another_size_is_fetched_again(tmp_path: Path) -> None:
    """Torn by a disk that was full, or of a version that did not look."""
    cache = cache_of(make_remote(tmp_path))
    cache.directory.mkdir(parents=True)
    for data in (b"", b"<html>", far(tmp_path, 0)[:-1]):
        (cache.directory / "shard-000000.tar").write_bytes(data)
        assert content(cache.open(0)) == far(tmp_path, 0)
    assert content(cache.open(0)) == far(tmp_path, 0)
    assert num_fetches(tmp_path) == 3


def test_a_cache_that_is_removed_during_the_run(tmp_path: Path) -> None:
    cache = cache_of(make_remote(tmp_path))
    for shard in (0, 1, 0):
        assert content(cache.open(shard)) == far(tmp_path, shard)
        shutil.rmtree(tmp_path / "cache")


def test_times_that_cannot_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files that are another user's: shards are then removed in the order in which they came."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(shard_cache.os, "utime", refuse)
    shards = ShardSet(make_remote(tmp_path, cache_bytes=3 * SHARD_BYTES))
    for number in (*range(21), *range(21)):
        shards.read(number)


def test_what_killed_processes_left_goes(tmp_path: Path) -> None:
    """Of the shard that is fetched, and, when room is made, of all that nobody is at work on."""
    cache = cache_of(make_remote(tmp_path))
    cache.directory.mkdir(parents=True)
    names = [f".shard-00000{shard}.tar.{host}.77.tmp" for shard in (0, 1, 2) for host in ("a", "b")]
    for name in (*names, ".other.tmp"):
        (cache.directory / name).write_bytes(b"half")
    with open(cache.directory / ".shard-000001.tar.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache.open(0)
        assert {path.name for path in cache.directory.glob(".*.tmp")} == {*names[2:4], ".other.tmp"}
    cache.open(2)
    assert {path.name for path in cache.directory.glob(".*.tmp")} == {".other.tmp"}


def test_sets_share_a_directory(tmp_path: Path) -> None:
    """Their shards have the same names; and what is signed anew is the same set."""
    sets = [make_remote(tmp_path / kind, kind) for kind in ("tokens", "features")]
    for directory in sets:
        stored = json.loads((directory / "remote.json").read_text())
        (directory / "remote.json").write_text(json.dumps({**stored, "cache": str(tmp_path / "one")}))
    for directory, kind in zip(sets, ("tokens", "features"), strict=True):
        assert content(cache_of(directory).open(0)) == far(tmp_path / kind, 0)
    entries = ShardSet(sets[0]).index.shards

    def directory_of(signature: str) -> Path:
        urls = tuple(f"https://h/{entry.name}?sig={signature}" for entry in entries)
        return ShardCache(RemoteShards(urls=urls, cache="/c", cache_gigabytes=1, window=1), entries, "x").directory

    assert directory_of("a") == directory_of("b") != cache_of(sets[0]).directory


def test_a_single_pass_is_fetched_ahead_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out samples, and images that tokens are made from: three shards at hand, and no more."""
    tokens, images = make_remote(tmp_path), make_remote(tmp_path / "i", "images")
    options: dict[str, Any] = {"batch_size": 1}
    passes = {
        tokens: evaluation_batches(tokens, None, **options),
        images: images_once(images, image_side=8, **options),
    }
    for directory, batches in passes.items():
        next(batches)
        cache, deadline = cache_of(directory), time.monotonic() + 60
        while len(list(cache.directory.glob("*.tar"))) < 3:
            assert time.monotonic() < deadline
            threading.Event().wait(0.01)
        assert {path.name for path in cache.directory.glob("*.tar")} == {
            f"shard-{number:06d}.tar" for number in range(3)
        }
        assert sum(1 for _ in batches) == 20
        assert len(list(cache.directory.glob("*.tar"))) == len(SIZES)


def test_features_of_remote_images(tmp_path: Path) -> None:
    """Their shards are fetched ahead, each once."""
    directory, cpu = make_remote(tmp_path, "images"), torch.device("cpu")
    made: list[Any] = []
    for images in (ShardSet(directory), ShardSet(tmp_path / "far")):
        names = tuple(shard.name for shard in images.index.shards)
        out = tmp_path / f"out-{len(made)}"
        writer = ShardWriter(out, Manifest(kind="features", shard_names=names, made_by=MadeBy(name="mean")))
        derivation = Derivation(
            lambda image, _: (np.asarray(image)[None], None), lambda x: {"mean.npy": x.mean((2, 3))}, lambda _: {}, 0
        )
        made.append(derive_set(images, writer, derivation, cpu, RunOptions(batch_size=2, workers=2)))
    assert made[0] == made[1]
    assert made[0] is not None
    assert num_fetches(tmp_path) == len(SIZES)
