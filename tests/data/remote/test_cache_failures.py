"""The cache of fetched shards on disks that are full or refuse, and with shards that cannot be fetched."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from mepa_ds.data.images import image_batches
from mepa_ds.data.options import LoaderOptions
from mepa_ds.data.remote import shard_cache
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.training import training_batches
from mepa_ds.errors import DamagedError, UserError
from tests.data.remote.cache_fixtures import (
    SIZES,
    cache_of,
    content,
    far,
    make_remote,
    no_waiting,
    num_fetches,
)

_no_waiting = pytest.fixture(autouse=True)(no_waiting)


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
    many = image_batches(images, batch_size=3, image_side=8, options=LoaderOptions(num_workers=1, on_damaged="skip"))
    for batches in (
        training_batches(tokens, None, global_batch=3, seed=0, options=LoaderOptions(on_damaged="skip")),
        many,
    ):
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
