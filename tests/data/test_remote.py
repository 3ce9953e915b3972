"""Remote sets: whole shards fetched ahead into a bounded cache, the same samples as from local files."""

from __future__ import annotations

import errno
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

from data_tools.merge_index import CacheOptions, Remote, Scan
from mepa_ds.data import remote as remote_module
from mepa_ds.data.images import image_batches
from mepa_ds.data.index import INDEX_NAME, MadeBy, ShardIndex
from mepa_ds.data.order import SampleOrder
from mepa_ds.data.remote import REMOTE_NAME, RemoteShards, ShardCache, fetch, is_remote
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.training import training_batches
from mepa_ds.data.writer import Plan, ShardWriter, npy_bytes
from mepa_ds.errors import DamagedError, UserError
from tests.data.shard_fixtures import features_of, make_set, tokens_of

SIZES = (3, 4, 2, 5, 3, 4)
SHARD_BYTES = 20_480  # the largest shard of tokens


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module.time, "sleep", lambda _: None)


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
    batches = list(itertools.islice(training_batches(tokens, features, global_batch=3, seed=4, num_workers=2), 14))
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
    keys = [b.keys for b in itertools.islice(image_batches(images, num_workers=2, **options), 7)]
    assert sorted(itertools.chain(*keys)) == [f"{number:09d}" for number in range(21)]
    assert keys == [b.keys for b in itertools.islice(image_batches(images, **options), 7)]


def test_the_cache_stays_within_its_bound(tmp_path: Path) -> None:
    tokens = make_remote(tmp_path, "tokens", cache_bytes=3 * SHARD_BYTES, window=1)
    shards = ShardSet(tokens)
    assert shards.cache is not None
    for number in itertools.chain(range(21), range(21)):
        shards.read(number)
        held = sum(path.stat().st_size for path in shards.cache.directory.glob("*.tar"))
        assert 0 < held <= 3 * SHARD_BYTES
    assert len(shards._files) <= 2


def test_shards_of_any_name_leave_the_cache(tmp_path: Path) -> None:
    """Foreign shards behind URLs such as https://host/0.tar?download=true."""
    make_set(tmp_path / "far", "images", SIZES)
    for number in range(len(SIZES)):
        (tmp_path / "far" / f"shard-{number:06d}.tar").rename(tmp_path / "far" / f"{number}.tar?download=true")
    largest = max(path.stat().st_size for path in (tmp_path / "far").glob("*.tar*"))
    cache = CacheOptions(str(tmp_path / "cache"), 3 * largest / 1e9, 1)
    Scan(f"pipe:cat '{tmp_path}/far/{{0..5}}.tar?download=true'", tmp_path / "near", None, 0, cache)()
    shards = ShardSet(tmp_path / "near")
    assert shards.cache is not None
    for number in range(21):
        shards.read(number)
        held = sum(path.stat().st_size for path in shards.cache.directory.glob("*true*"))
        assert 0 < held <= 3 * largest


def test_shards_are_fetched_ahead_in_the_order_of_use(tmp_path: Path) -> None:
    tokens = make_remote(tmp_path, "tokens", window=1)
    batches = training_batches(tokens, None, global_batch=1, seed=4)
    next(batches)
    cache = ShardSet(tokens).cache
    assert cache is not None
    first_two = SampleOrder(SIZES, 4, window=1).windows(0)[:2]
    expected = {f"shard-{window[0]:06d}.tar" for window in first_two}
    deadline = time.monotonic() + 20
    while {path.name for path in cache.directory.glob("*.tar")} != expected:
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_a_small_cache_is_refused(tmp_path: Path) -> None:
    tokens = make_remote(tmp_path, "tokens", cache_bytes=3 * SHARD_BYTES, window=2)
    with pytest.raises(UserError, match=r"cache_gigabytes .* is less than three windows of 2 shards"):
        ShardSet(tokens)

    remote = RemoteShards(urls=("x://a",), cache="$NO_SUCH_VARIABLE/x", cache_gigabytes=1, window=1)
    with pytest.raises(UserError, match="a variable that is not set"):
        ShardCache(remote, [], "shards")


def test_what_cannot_be_fetched_is_named(tmp_path: Path) -> None:
    tokens = make_remote(tmp_path, "tokens")
    (tmp_path / "far" / "tokens" / "shard-000001.tar").unlink()
    with pytest.raises(DamagedError, match=r"shard-000001\.tar: cannot be fetched"):
        ShardSet(tokens).read(4)
    assert ShardSet(tokens).read(0)[0] == "000000000"
    skipping = training_batches(tokens, None, global_batch=21, seed=0, on_damaged="skip")
    assert len(next(skipping).damaged) >= 4


def test_a_shard_that_is_gone_is_not_waited_for_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = make_remote(tmp_path, "tokens")
    gone = tmp_path / "far" / "tokens" / "shard-000001.tar"
    content = gone.read_bytes()
    gone.unlink()
    tried: list[str] = []
    monkeypatch.setattr(remote_module, "fetch", lambda url, *args: [tried.append(url), fetch(url, *args)][1])
    shards, now = ShardSet(tokens), time.monotonic()
    for number in (3, 4, 5, 6):
        with pytest.raises(DamagedError, match=r"shard-000001\.tar: cannot be fetched"):
            shards.read(number)
    assert len(tried) == 1
    gone.write_bytes(content)
    monkeypatch.setattr(remote_module.time, "monotonic", lambda: now + 400)
    later = time.time() + 400
    monkeypatch.setattr(remote_module.time, "time", lambda: later)
    assert shards.read(3)[0] == "000000003"


def test_what_one_process_has_tried_in_vain_others_do_not_try_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(remote_module, "_copy", lambda url, _: [tried.append(url), 1 / 0])
    monkeypatch.setattr(remote_module.time, "sleep", lambda _: None)
    for _ in range(4):  # as four ranks, each with failures of its own
        with pytest.raises(DamagedError, match="x: cannot be fetched: division by zero"):
            fetch("pipe:cat x", tmp_path / "x.tar")
    assert len(tried) == 3
    monkeypatch.setattr(remote_module, "_BEGAN", time.time() + 1)  # the next start
    with pytest.raises(DamagedError, match="x: cannot be fetched"):
        fetch("pipe:cat x", tmp_path / "x.tar")
    assert len(tried) == 6


def test_another_users_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    tokens = make_remote(tmp_path, "tokens")
    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(UserError, match=r"cache/.*: cannot write there: Permission denied; .*cache in remote\.json"):
        ShardSet(tokens).read(0)


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


def test_a_full_cache_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tokens = make_remote(tmp_path, "tokens")
    monkeypatch.setattr("mepa_ds.files.os.replace", full)
    batches = training_batches(tokens, None, global_batch=3, seed=0, on_damaged="skip")  # no damage: not to be skipped
    with pytest.raises(UserError, match=r"cache/.*/shard-.*tar: the disk or quota is full \(No space left"):
        next(batches)


def test_what_killed_processes_left_in_the_cache_goes(tmp_path: Path) -> None:
    stale = [tmp_path / f".here.{host}.77.tmp" for host in ("a", "b")]
    other = tmp_path / ".there.a.77.tmp"
    for path in (*stale, other):
        path.write_bytes(b"half")
    fetch("pipe:echo content", tmp_path / "here")
    assert not any(path.exists() for path in stale)
    assert other.exists()


def test_a_garbled_remote_json_is_named(tmp_path: Path) -> None:
    tokens = make_remote(tmp_path, "tokens")
    (tokens / REMOTE_NAME).write_text("{")
    with pytest.raises(UserError, match=r"remote\.json: cannot be read: .*; run data_tools/merge_index\.py again"):
        ShardSet(tokens)


def test_a_fetch_that_fails_at_first_is_tried_again(tmp_path: Path) -> None:
    script = tmp_path / "flaky.sh"
    script.write_text(f"if mkdir {tmp_path}/tried 2>/dev/null; then exit 3; fi; echo content\n")
    assert fetch(f"pipe:sh {script}", tmp_path / "here").read_text() == "content\n"


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
    writer = ShardWriter(far, Plan(kind="tokens", shard_names=names, made_by=MadeBy(name="new")))
    for number, name in enumerate(names):
        members = {"note": b"x" * 5000, "tokens.npy": npy_bytes(tokens_of(number)), "cls": b"7"}
        writer.write_shard(name, [(f"{number:09d}", members)])
    writer.finish()
    Remote(f"pipe:cat {far}/{{}}", tmp_path / "r-tokens", CacheOptions(str(tmp_path / "cache"), 1, 2))()
    renewed = ShardSet(tmp_path / "r-tokens")
    assert [renewed.read(number)[1]["cls"] for number in range(len(renewed))] == [b"7"] * len(names)


@pytest.mark.parametrize(
    ("url", "remote"),
    [("https://a/b", True), ("pipe:cat x", True), ("s3://b/k", True), ("/data/x", False), ("data/{0..3}.tar", False)],
)
def test_what_counts_as_remote(url: str, remote: bool) -> None:
    assert is_remote(url) == remote


def test_names_in_an_index_cannot_leave_its_directory(tmp_path: Path) -> None:
    make_set(tmp_path, "tokens", [1])
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["shards"][0]["name"] = "../shard-000000.tar"
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"shards\.0\.name"):
        ShardSet(tmp_path)
    assert not (tmp_path / REMOTE_NAME).exists()


def test_processes_share_a_cache_without_fetching_twice(tmp_path: Path) -> None:
    """Four processes ask for one file at once; the pipe notes each fetch."""
    script = f"sleep 0.2; echo fetched >> {tmp_path}/log; cat {tmp_path}/source"
    (tmp_path / "source").write_text("content")
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                fetch(f"pipe:{script}", tmp_path / "here")
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert (tmp_path / "here").read_text() == "content"
    assert (tmp_path / "log").read_text() == "fetched\n"
