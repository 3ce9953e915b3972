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

from data_tools.precompute_sets import Derivation, RunOptions, derive_set
from data_tools.remote_index import CacheOptions, Remote
from mepa_ds.data.images import image_batches
from mepa_ds.data.order import SampleOrder
from mepa_ds.data.remote import fetching, shard_cache
from mepa_ds.data.remote.remote_file import RemoteShards
from mepa_ds.data.remote.shard_cache import ShardCache
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import MadeBy
from mepa_ds.data.shards.open_files import OpenFile
from mepa_ds.data.shards.writer import Plan, ShardWriter
from mepa_ds.data.training import evaluation_batches, training_batches
from mepa_ds.errors import DamagedError, UserError
from tests.data.remote.test_shared_lock import forbid_flock
from tests.data.shard_fixtures import make_set

SIZES = (3, 4, 2, 5, 3, 4)
SHARD_BYTES = 20_480  # the largest shard of tokens


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_PAUSE_SECONDS", 0.0)


def make_remote(tmp_path: Path, kind: str = "tokens", cache_bytes: float = 1e9, window: int = 1) -> Path:
    """A remote set whose fetches are counted in `log`."""
    make_set(tmp_path / "far", kind, SIZES)
    options, out = CacheOptions(str(tmp_path / "cache"), cache_bytes / 1e9, window), tmp_path / f"near-{kind}"
    Remote(f"pipe:echo {{}} >> {tmp_path}/log; cat {tmp_path}/far/{{}}", out, options)()
    (tmp_path / "log").unlink()
    return out


def num_fetches(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().split()) if log.exists() else 0


def cache_of(remote: Path) -> ShardCache:
    cache = ShardSet(remote).cache
    assert cache is not None
    return cache


def content(file: OpenFile) -> bytes:
    return os.pread(file.descriptor, os.fstat(file.descriptor).st_size, 0)


def far(tmp_path: Path, shard: int) -> bytes:
    return (tmp_path / "far" / f"shard-{shard:06d}.tar").read_bytes()


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
    with pytest.raises(UserError, match=r"remote\.json names 1 shards, the index 0; run .*merge_index\.py again"):
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
        batches = image_batches(images, num_workers=num_workers, **options)
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


class FullDisk:
    """Lets files have their name while the cache holds fewer shards than this."""

    def __init__(self, directory: Path, room: int):
        self._directory, self.room, self._replace = directory, room, os.replace

    def replace(self, source: Path, target: Path) -> None:
        if len(list(self._directory.glob("*.tar"))) >= self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._replace(source, target)


def test_on_a_disk_smaller_than_the_cache_older_shards_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = cache_of(make_remote(tmp_path))
    disk = FullDisk(cache.directory, 4)
    monkeypatch.setattr("mepa_ds.files.os.replace", disk.replace)
    for shard in (*range(len(SIZES)), *range(len(SIZES))):
        assert content(cache.open(shard)) == far(tmp_path, shard)
    assert num_fetches(tmp_path) <= 2 * len(SIZES) + 1  # it is met once
    assert capsys.readouterr().err.count("the disk is full with") == 1
    disk.room = 0
    with pytest.raises(UserError, match=r"cache/.*shard-000000\.tar: the disk or quota is full"):
        cache.open(0)


def test_a_full_disk_ends_a_run_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In threads and in decoding processes; it is no damage, which on_damaged="skip" leaves out."""
    tokens, images = make_remote(tmp_path), make_remote(tmp_path / "i", "images")
    monkeypatch.setattr("mepa_ds.files.os.replace", FullDisk(tmp_path, 0).replace)
    many = image_batches(images, batch_size=3, image_side=8, num_workers=1, on_damaged="skip")
    for batches in (training_batches(tokens, None, global_batch=3, seed=0, on_damaged="skip"), many):
        with pytest.raises(UserError, match=r"^/.*cache/.*/shard-.*tar: the disk or quota is full \(No space left"):
            next(batches)


def test_a_directory_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first, or since its rights were changed."""

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    tokens = make_remote(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("mepa_ds.files.os.replace", forbidden)
        with pytest.raises(UserError, match="cannot write there: Permission denied; get the right to write") as caught:
            ShardSet(tokens).read(0)
        assert not isinstance(caught.value, DamagedError)
    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(UserError, match=r"cache/.*: cannot write there: Permission denied; .*cache in remote\.json"):
        ShardSet(tokens).read(0)


def test_a_shard_that_is_gone_is_not_waited_for_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = make_remote(tmp_path)
    gone = tmp_path / "far" / "shard-000001.tar"
    there = gone.read_bytes()
    gone.unlink()
    shards, now = ShardSet(tokens), time.monotonic()
    for number in (3, 4, 5, 6):
        with pytest.raises(DamagedError, match=r"shard-000001\.tar: cannot be fetched"):
            shards.read(number)
    assert num_fetches(tmp_path) == 3
    assert shards.read(0)[0] == "000000000"
    gone.write_bytes(there)
    monkeypatch.setattr(shard_cache.time, "monotonic", lambda: now + 400)
    assert shards.read(3)[0] == "000000003"


@pytest.mark.parametrize(
    ("change", "tried"),
    [
        ({}, False),
        ({"mtime": -7200}, False),
        ({"mtime": 7200}, False),
        ({"clock": -86400}, False),  # the time of day is set back
        ({"later": 301}, True),
        ({"start": True}, True),
        ({"start": True, "mtime": 7200}, True),
        ({"boot": "of another machine"}, True),
        ({"note": b"{"}, True),
        ({"note": b"[]"}, True),
        ({"note": b'{"boot": 1}'}, True),
        ({"at": 1e9}, True),
    ],
)
def test_what_one_process_has_tried_in_vain_others_do_not_try_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], tried: bool
) -> None:
    """Processes of the same start, by the machine's own clock; whatever time a file server gives the note."""
    tokens = make_remote(tmp_path)
    (tmp_path / "far" / "shard-000000.tar").unlink()
    with pytest.raises(DamagedError, match="cannot be fetched"):
        cache_of(tokens).open(0)
    (note,) = (tmp_path / "cache").rglob("*.failed")
    if "mtime" in change:
        os.utime(note, (time.time() + change["mtime"],) * 2)
    if "clock" in change:
        monkeypatch.setattr(shard_cache.time, "time", lambda: change["clock"])
    if "later" in change:
        later = time.monotonic() + change["later"]
        monkeypatch.setattr(shard_cache.time, "monotonic", lambda: later)
    if "start" in change:
        monkeypatch.setattr(shard_cache, "_BEGAN", time.monotonic())
    stored = json.loads(note.read_text()) | {key: change[key] for key in ("boot", "at") if key in change}
    times = note.stat()
    note.write_bytes(change.get("note", json.dumps(stored).encode()))
    os.utime(note, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DamagedError, match=r"shard-000000\.tar: cannot be fetched"):
        cache_of(tokens).open(0)  # as another rank, with failures of its own
    assert num_fetches(tmp_path) == (6 if tried else 3)


def test_a_fetch_that_succeeds_takes_the_note_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = make_remote(tmp_path)
    gone = tmp_path / "far" / "shard-000000.tar"
    there = gone.read_bytes()
    gone.unlink()
    with pytest.raises(DamagedError, match="cannot be fetched"):
        cache_of(tokens).open(0)
    gone.write_bytes(there)
    monkeypatch.setattr(shard_cache, "_BEGAN", time.monotonic())
    cache_of(tokens).open(0)
    assert not list((tmp_path / "cache").rglob("*.failed"))


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
        images: image_batches(images, image_side=8, train=False, **options),
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
    made = []
    for images in (ShardSet(directory), ShardSet(tmp_path / "far")):
        names = tuple(shard.name for shard in images.index.shards)
        out = tmp_path / f"out-{len(made)}"
        writer = ShardWriter(out, Plan(kind="features", shard_names=names, made_by=MadeBy(name="mean")))
        derivation = Derivation(
            lambda image, _: (np.asarray(image)[None], None), lambda x: {"mean.npy": x.mean((2, 3))}, lambda _: {}, 0
        )
        made.append(derive_set(images, writer, derivation, cpu, RunOptions(batch_size=2, workers=2)))
    assert made[0] == made[1]
    assert made[0] is not None
    assert num_fetches(tmp_path) == len(SIZES)
