"""Indices of sets: scanned, fetched, gathered."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import (
    INDEX_NAME,
    ShardIndex,
    offset_index_path,
    read_description,
    read_offset_index,
    write_offset_index,
)
from mepa_ds.data_tools.merge_index import CacheOptions, Merge, Remote, Scan
from mepa_ds.data_tools.verify_shards import Options as VerifyOptions
from mepa_ds.data_tools.verify_shards import verify
from mepa_ds.errors import DamagedError, UserError
from mepa_ds.files import sha256_of_file
from tests.data.shard_fixtures import make_set
from tests.data.shards.tar_fixtures import add

SIZES = (3, 4, 2, 5, 3, 4)


def test_scanning_shards_that_others_made(tmp_path: Path, server: str) -> None:
    """The same content as our own index, from the tars alone: in place, and behind a brace pattern of URLs."""
    ours = make_set(tmp_path / "far" / "images", "images", SIZES)
    for path in (tmp_path / "far" / "images").iterdir():
        if path.suffix != ".tar":
            path.unlink()
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(ours.classes))
    pattern = f"{server}/images/shard-{{000000..000005}}.tar"
    scanned = Scan(pattern, tmp_path / "near", names, 0, CacheOptions(str(tmp_path / "cache")))()
    assert (scanned.shards, scanned.members, scanned.classes) == (ours.shards, ours.members, ours.classes)
    assert ShardSet(tmp_path / "near").read(7)[0] == "000000007"
    assert Scan(str(tmp_path / "far" / "images"), workers=0)().shards == ours.shards
    assert ShardIndex.read(tmp_path / "far" / "images").keys_sha256 == ours.keys_sha256


def test_scanning_keeps_its_hands_off_sets_that_tools_made(tmp_path: Path) -> None:
    index = make_set(tmp_path, "tokens", SIZES)
    with pytest.raises(UserError, match="holds tokens made by 'test', whose index a scan would lose"):
        Scan(str(tmp_path), workers=0)()
    assert ShardIndex.read(tmp_path) == index


@pytest.mark.parametrize("remove", [(), (INDEX_NAME,), ("*.tar",)])
def test_a_set_that_lies_here_is_not_replaced_by_a_remote_one(tmp_path: Path, remove: tuple[str, ...]) -> None:
    make_set(tmp_path / "far", "tokens", SIZES)
    make_set(tmp_path / "here", "images", [3])
    for path in [path for pattern in remove for path in (tmp_path / "here").glob(pattern)]:
        path.unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    url, cache = f"pipe:cat {tmp_path}/far/", CacheOptions(str(tmp_path / "cache"), 1, 2)
    for command in (
        Remote(url + "{}", tmp_path / "here", cache),
        Scan(url + "shard-{000000..000005}.tar", tmp_path / "here", None, 0, cache),
    ):
        with pytest.raises(UserError, match=r"here: holds"):
            command()
    assert {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()} == before


def test_a_page_in_place_of_an_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(UserError, match=r"index\.json: cannot be fetched: a page .*<!DOCTYPE html>.*check the address"):
        Remote(f"pipe:cat {tmp_path}/{{}}", tmp_path / "near")()


def test_class_names_that_cannot_be_read(tmp_path: Path) -> None:
    make_set(tmp_path, "images", SIZES)
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(UserError, match=r"--classes: .*names\.txt: cannot be read: No such file"):
        Scan(str(tmp_path), classes=tmp_path / "names.txt", workers=0)()
    (tmp_path / "names.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"--classes: .*names\.txt: is no UTF-8 text"):
        Scan(str(tmp_path), classes=tmp_path / "names.txt", workers=0)()


def test_scanning_some_of_a_directory(tmp_path: Path) -> None:
    ours = make_set(tmp_path, "images", SIZES)
    (tmp_path / INDEX_NAME).unlink()
    assert Scan(f"{tmp_path}/shard-{{000001..000002}}.tar", workers=0)().shards == ours.shards[1:3]
    with pytest.raises(UserError, match=r"shard-000009\.tar: no tar files there"):
        Scan(f"{tmp_path}/shard-{{000001..000009..8}}.tar", workers=0)()
    with pytest.raises(UserError, match="lies in several directories"):
        Scan(f"{tmp_path}/{{a,b}}/x.tar", workers=0)()


def theirs(path: Path, sizes: Sequence[int]) -> None:
    """A shard that others made: sample n has an image of `sizes[n]` bytes."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, size in enumerate(sizes):
            add(tar, f"{number}.jpg", bytes([number + 1]) * size)
            add(tar, f"{number}.cls", str(number).encode())


@pytest.mark.parametrize("seconds", [1, -7 * 86400])
def test_a_shard_that_was_replaced_is_scanned_anew(tmp_path: Path, seconds: int) -> None:
    """Also by an older file, as cp -p and rsync -a bring it. Tars are padded, so that the size may be the same."""
    shard, other = tmp_path / "0.tar", tmp_path / "1.tar"
    theirs(shard, (10, 10, 2000, 10))
    theirs(other, (10,))
    before = Scan(str(tmp_path), workers=0)().shards
    written = shard.stat()
    theirs(shard, (2000, 10, 10, 10))
    os.utime(shard, ns=(written.st_atime_ns, written.st_mtime_ns + seconds * 10**9))
    assert shard.stat().st_size == written.st_size
    shards = ShardSet(tmp_path)  # by the old index; offsets are those of the file that is there
    for number, size in enumerate((2000, 10, 10, 10)):
        assert shards.read(number)[1]["jpg"] == bytes([number + 1]) * size
    after = Scan(str(tmp_path), workers=0)().shards
    assert after[0].sha256 == sha256_of_file(shard) != before[0].sha256
    assert after[1] == before[1]
    assert read_offset_index(shard, "images", foreign=True).sizes_NM[:, 0].tolist() == [2000, 10, 10, 10]


def test_other_samples_in_a_replaced_shard_are_named(tmp_path: Path) -> None:
    theirs(tmp_path / "0.tar", (10, 10))
    Scan(str(tmp_path), workers=0)()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("0.jpg", "other.jpg"):
            add(tar, name, b"x")
    os.utime(tmp_path / "0.tar", ns=(0, 0))
    with pytest.raises(DamagedError, match=r"0\.tar: its keys are not those of the index; if .*mepa data scan on"):
        ShardSet(tmp_path).read(1)


def test_what_is_unchanged_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs(tmp_path / "0.tar", (10, 20))
    Scan(str(tmp_path), workers=0)()
    monkeypatch.setattr("mepa_ds.data_tools.merge_index.scan_tar", None)
    monkeypatch.setattr("mepa_ds.data.shards.index.scan_tar", None)
    assert Scan(str(tmp_path), workers=0)().num_samples == 2
    assert ShardSet(tmp_path).read(1)[1]["jpg"] == bytes([2]) * 20


def test_a_copy_with_other_times_is_read_alike(tmp_path: Path) -> None:
    """As cp -r makes it: sets of others are stepped over again, sets of this project's tools are taken as they are."""
    theirs(tmp_path / "in" / "0.tar", (10, 20))
    Scan(str(tmp_path / "in"), workers=0)()
    make_set(tmp_path / "built", "images", [3])
    for name in ("in", "built"):
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-copy", copy_function=shutil.copyfile)
        for path in (tmp_path / f"{name}-copy").iterdir():
            os.utime(path, ns=(0, 10**18))
        ours, copy = ShardSet(tmp_path / name), ShardSet(tmp_path / f"{name}-copy")
        assert [copy.read(number) for number in range(len(copy))] == [ours.read(number) for number in range(len(ours))]
    assert read_description(tmp_path / "built-copy" / "shard-000000.tar") is not None  # a rerun keeps it
    assert verify(VerifyOptions((tmp_path / "in-copy",), decode=False, workers=0))


def test_tables_of_earlier_versions_are_read_and_scanned_anew(tmp_path: Path) -> None:
    """They hold no time."""
    theirs(tmp_path / "0.tar", (10, 20))
    Scan(str(tmp_path), workers=0)()
    description = read_description(tmp_path / "0.tar")
    assert description is not None
    old = description.model_copy(update={"mtime_ns": None})
    write_offset_index(tmp_path / "0.tar", read_offset_index(tmp_path / "0.tar", "images"), old)
    os.utime(tmp_path / "0.tar", ns=(0, 0))
    assert ShardSet(tmp_path).read(1)[1]["jpg"] == bytes([2]) * 20
    Scan(str(tmp_path), workers=0)()
    scanned = read_description(tmp_path / "0.tar")
    assert scanned is not None
    assert scanned.mtime_ns == 0


def test_merge_says_what_is_missing(tmp_path: Path) -> None:
    index = make_set(tmp_path, "tokens", SIZES)
    assert Merge(tmp_path)() == index
    offset_index_path(tmp_path / "shard-000002.tar").unlink()
    with pytest.raises(UserError, match=r"1 shards are missing or torn, shard-000002\.tar"):
        Merge(tmp_path)()
    with pytest.raises(UserError, match="no such directory"):
        Merge(tmp_path / "nowhere")()
