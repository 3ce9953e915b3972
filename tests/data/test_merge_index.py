"""Indices of sets: scanned, fetched, gathered."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_tools.merge_index import CacheOptions, Merge, Remote, Scan
from mepa_ds.data.index import INDEX_NAME, ShardIndex, table_path
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.errors import UserError
from tests.data.shard_fixtures import make_set

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


def test_a_shard_that_was_written_anew_is_scanned_anew(tmp_path: Path) -> None:
    """Tars are padded, so that its size may be the old one."""
    make_set(tmp_path, "images", [3, 3])
    (tmp_path / INDEX_NAME).unlink()
    shard = tmp_path / "shard-000000.tar"
    before = Scan(str(tmp_path), workers=0)().shards
    content = bytearray(shard.read_bytes())
    content[600] ^= 1  # in the first member
    shard.write_bytes(content)
    os.utime(shard, ns=(shard.stat().st_atime_ns, table_path(shard).stat().st_mtime_ns + 1))
    after = Scan(str(tmp_path), workers=0)().shards
    assert after[0].bytes == before[0].bytes
    assert after[0].sha256 != before[0].sha256
    assert after[1] == before[1]


def test_merge_says_what_is_missing(tmp_path: Path) -> None:
    index = make_set(tmp_path, "tokens", SIZES)
    assert Merge(tmp_path)() == index
    table_path(tmp_path / "shard-000002.tar").unlink()
    with pytest.raises(UserError, match=r"1 shards are missing or torn, shard-000002\.tar"):
        Merge(tmp_path)()
    with pytest.raises(UserError, match="no such directory"):
        Merge(tmp_path / "nowhere")()
