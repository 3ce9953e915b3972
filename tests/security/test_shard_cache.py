"""The cache of fetched shards in places that others may reach: what they put there is not used, followed or emptied."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from mepa_ds.data.remote import cache_places, shard_cache
from mepa_ds.data.remote.cache_places import note_of
from mepa_ds.data.remote.fetching import content_of, fetch
from mepa_ds.data.remote.remote_file import RemoteShards
from mepa_ds.data.remote.shard_cache import ShardCache
from mepa_ds.data.remote.shared_lock import locked
from mepa_ds.data.shards.index import ShardEntry
from mepa_ds.errors import UserError
from tests.data.remote.cache_fixtures import cache_of, content, far, make_remote, no_waiting, num_fetches

_no_waiting = pytest.fixture(autouse=True)(no_waiting)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of other users")
GOOD = b"good" * 100


def cache_at(tmp_path: Path, place: str) -> ShardCache:
    (tmp_path / "far.tar").write_bytes(GOOD)
    entry = ShardEntry(
        name="a.tar", num_samples=0, bytes=len(GOOD), sha256=hashlib.sha256(GOOD).hexdigest(), keys_sha256=""
    )
    remote = RemoteShards(urls=(f"file://{tmp_path}/far.tar",), cache=place, cache_gigabytes=1, window=1)
    return ShardCache(remote, [entry], "x")


def test_a_copy_of_other_content_is_not_used(tmp_path: Path) -> None:
    """Of the same size, in a directory that was there before."""
    cache = cache_at(tmp_path, str(tmp_path / "cache"))
    cache.directory.mkdir(parents=True)
    (cache.directory / "a.tar").write_bytes(b"evil" * 100)
    assert content(cache.open(0)) == GOOD
    assert cache.directory.stat().st_mode & 0o777 == 0o700


def test_content_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever process comes first; never by one that finds it as it was verified."""
    cache, computed = cache_at(tmp_path, str(tmp_path / "cache")), list[int]()
    digest = cache_places.sha256_of

    def noting(file: int) -> str:
        computed.append(file)
        return digest(file)

    monkeypatch.setattr(shard_cache, "sha256_of", noting)
    for _ in range(3):
        assert content(cache_at(tmp_path, str(tmp_path / "cache")).open(0)) == GOOD
    assert not computed  # it was fetched, and compared then
    note_of(cache.directory / "a.tar").unlink()
    for _ in range(3):
        assert content(cache.open(0)) == GOOD
    assert len(computed) == 1
    os.utime(cache.directory / "a.tar", (1, 1))  # written since
    cache.open(0)
    assert len(computed) == 2
    (cache.directory / "a.tar").write_bytes(b"evil" * 100)
    assert content(cache.open(0)) == GOOD


def test_a_link_in_place_of_a_copy_is_not_followed(tmp_path: Path) -> None:
    cache = cache_at(tmp_path, str(tmp_path / "cache"))
    cache.directory.mkdir(parents=True)
    (tmp_path / "other").write_bytes(GOOD)
    (cache.directory / "a.tar").symlink_to(tmp_path / "other")
    assert content(cache.open(0)) == GOOD
    assert not (cache.directory / "a.tar").is_symlink()
    (cache.directory / "a.tar").unlink()
    os.mkfifo(cache.directory / "a.tar")
    assert content(cache.open(0)) == GOOD


@pytest.mark.parametrize("name", [".a.tar.lock", ".evict.lock", ".a.tar.failed", ".a.tar.verified", ".a.tar.claim"])
def test_links_in_place_of_locks_and_notes_are_not_followed(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "thesis.tex"
    victim.write_text("years of work")
    cache = cache_at(tmp_path, str(tmp_path / "cache"))
    cache.directory.mkdir(parents=True)
    (cache.directory / name).symlink_to(victim)
    if name.endswith(".failed"):
        (tmp_path / "far.tar").unlink()
    with pytest.raises(UserError) if name.endswith((".lock", ".failed")) else nullcontext():
        cache.open(0)
    assert victim.read_text() == "years of work"


def test_a_lock_is_no_link(tmp_path: Path) -> None:
    (tmp_path / ".x.lock").symlink_to(tmp_path / "victim")
    with (
        pytest.raises(UserError, match="a link or a device lies where a lock is to be; remove it"),
        locked(tmp_path / "x"),
    ):
        pass
    assert not (tmp_path / "victim").exists()


@as_root
def test_files_and_directories_of_others(tmp_path: Path) -> None:
    """A copy of another user is fetched again; their directory is refused; a group's disk is shared."""
    cache = cache_at(tmp_path, str(tmp_path / "cache"))
    cache.directory.mkdir(parents=True)
    os.chown(cache.directory.parent, 65534, 65534)  # as of a group's disk
    (cache.directory / "a.tar").write_bytes(b"evil" * 100)
    os.chown(cache.directory / "a.tar", 65534, 65534)
    assert content(cache.open(0)) == GOOD
    assert (cache.directory / "a.tar").stat().st_uid == 0
    os.chown(cache.directory, 65534, 65534)
    with pytest.raises(UserError, match=r"cache in remote\.json: .* is a directory of another user; remove it"):
        cache.open(0)


@as_root
@pytest.mark.parametrize("kind", ["directory", "link"])
def test_the_temporary_directory_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    cache = cache_at(tmp_path, "$TMPDIR/mepa_ds-shards-$UID")
    assert content(cache.open(0)) == GOOD
    place = shared / f"mepa_ds-shards-{os.getuid()}"
    assert place.stat().st_mode & 0o777 == 0o700
    other = cache_at(tmp_path, str(shared / "mine"))
    if kind == "directory":
        (shared / "mine").mkdir()
        os.chown(shared / "mine", 65534, 65534)
    else:
        (shared / "mine").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"another user; remove it|no directory of yours; remove it"):
        other.open(0)


@pytest.mark.parametrize("mask", [0o002, 0o000])
def test_whatever_the_umask_copies_are_kept(tmp_path: Path, mask: int) -> None:
    near = make_remote(tmp_path)
    before = os.umask(mask)
    try:
        for _ in range(3):
            assert content(cache_of(near).open(0)) == far(tmp_path, 0)
    finally:
        os.umask(before)
    assert num_fetches(tmp_path) == 1
    (file,) = cache_of(near).directory.glob("*.tar")
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_fetch_leaves_links_alone(tmp_path: Path) -> None:
    """What is fetched takes the place of a link."""
    (tmp_path / "far.tar").write_bytes(GOOD)
    (tmp_path / "victim").write_text("years of work")
    (tmp_path / "a.tar").symlink_to(tmp_path / "victim")
    fetch(f"file://{tmp_path}/far.tar", tmp_path / "a.tar", content_of(hashlib.sha256(GOOD).hexdigest(), len(GOOD)))
    assert (tmp_path / "victim").read_text() == "years of work"
