"""Shard sets: deterministic bytes, complete or absent, the same after any interruption."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import INDEX_NAME, MadeBy, ShardIndex, offset_index_path, read_offset_index
from mepa_ds.data.shards.offset_index import scan_tar
from mepa_ds.data.shards.writer import MANIFEST_NAME, Manifest, ShardWriter, finish_index, npy_bytes, read_manifest
from mepa_ds.errors import UserError
from mepa_ds.files import sha256_of_file
from tests.data.shard_fixtures import CLASSES, make_set, sample_of


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def manifest_of(num_shards: int = 2, **settings: Any) -> Manifest:
    names = tuple(f"shard-{number:06d}.tar" for number in range(num_shards))
    return Manifest(kind="tokens", shard_names=names, classes=CLASSES, made_by=MadeBy(name="t", settings=settings))


def test_index_says_what_is_there(tmp_path: Path) -> None:
    index = make_set(tmp_path, "tokens", [3, 2])
    assert index == ShardIndex.read(tmp_path)
    assert index.num_samples == 5
    assert index.members["tokens.npy"].dtype == "uint16"
    assert index.members["tokens.npy"].shape == (5,)
    for entry in index.shards:
        path = tmp_path / entry.name
        assert (entry.bytes, entry.sha256) == (path.stat().st_size, sha256_of_file(path))
        stored, scanned = read_offset_index(path, "tokens"), scan_tar(path, "tokens")
        np.testing.assert_array_equal(stored.keys_N, scanned.keys_N)
        np.testing.assert_array_equal(stored.offsets_NM, scanned.offsets_NM)
        np.testing.assert_array_equal(stored.sizes_NM, scanned.sizes_NM)
        assert stored.extensions == scanned.extensions


def test_siblings_share_the_digest_of_their_keys(tmp_path: Path) -> None:
    images, tokens = make_set(tmp_path / "i", "images", [3, 2]), make_set(tmp_path / "t", "tokens", [3, 2])
    assert images.keys_sha256 == tokens.keys_sha256
    assert make_set(tmp_path / "u", "tokens", [2, 3]).keys_sha256 != images.keys_sha256
    assert make_set(tmp_path / "v", "tokens", [3, 1]).keys_sha256 != images.keys_sha256


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    make_set(tmp_path / "a", "features", [3, 2])
    make_set(tmp_path / "b", "features", [3, 2])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_set_is_incomplete_until_its_last_shard(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, manifest_of())
    writer.write_shard("shard-000001.tar", [sample_of("tokens", 3)])
    assert writer.finish() is None
    assert writer.missing() == ["shard-000000.tar"]
    with pytest.raises(UserError, match="1 of 2 shards are missing"):
        finish_index(tmp_path, read_manifest(tmp_path))
    with pytest.raises(UserError, match=r"no index\.json there; if a job is still writing"):
        ShardIndex.read(tmp_path)
    other_process = ShardWriter(tmp_path, manifest_of())
    other_process.write_shard("shard-000000.tar", [sample_of("tokens", 2)])
    index = other_process.finish()
    assert index is not None
    assert index.num_samples == 2
    assert not (tmp_path / MANIFEST_NAME).exists()


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    ShardWriter(tmp_path, manifest_of(side=8)).write_shard("shard-000000.tar", [sample_of("tokens", 1)])
    with pytest.raises(UserError, match=r"other settings \(made_by.settings.side 8 there, 9 now\)"):
        ShardWriter(tmp_path, manifest_of(side=9))
    make_set(tmp_path / "done", "tokens", [1])
    with pytest.raises(UserError, match="other settings"):
        ShardWriter(tmp_path / "done", manifest_of())


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([sample_of("tokens", 1), sample_of("tokens", 1)], "key '000000001' comes twice"),
        ([("../a", {"cls": b"1"})], "unsafe path"),
        ([("a.b", {"cls": b"1"})], "has a dot"),
        ([("__MACOSX/a", {"cls": b"1"})], "or is hidden"),
        ([("a", {"x.npy": npy_bytes(np.zeros(2))}), ("b", {"x.npy": npy_bytes(np.zeros(3))})], "differ"),
    ],
)
def test_bad_samples_leave_nothing_behind(tmp_path: Path, samples: Any, message: str) -> None:
    writer = ShardWriter(tmp_path, manifest_of())
    with pytest.raises(UserError, match=message):
        writer.write_shard("shard-000000.tar", samples)
    assert set(contents(tmp_path)) == {MANIFEST_NAME}


def test_a_label_beyond_int64_is_named_when_it_is_read(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, manifest_of(1).model_copy(update={"classes": ()}))
    writer.write_shard("shard-000000.tar", [("0", {"cls": str(2**63).encode()}), ("1", {"cls": b"1"})])
    writer.finish()
    with pytest.raises(UserError, match="sample '0': its label b'9223372036854775808' is no number"):
        ShardSet(tmp_path).read_labels(np.array([0]))
    assert ShardSet(tmp_path).read_labels(np.array([1])) == [1]


def test_a_shard_has_no_offset_index_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends between the two writes must not leave the offset index of an older tar of the same size."""
    writer, name = ShardWriter(tmp_path, manifest_of(1)), "shard-000000.tar"
    writer.write_shard(name, [sample_of("tokens", 1)])
    before = (tmp_path / name).stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr("mepa_ds.data.shards.writer.write_offset_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            writer.write_shard(name, [("longer", sample_of("tokens", 2)[1])])
    assert (tmp_path / name).stat().st_size == before
    assert not writer.is_complete(name)
    assert not offset_index_path(tmp_path / name).exists()


@pytest.mark.parametrize("name", [MANIFEST_NAME, "shard-000001.tar", "shard-000001.idx.npz", "index.json"])
def test_a_full_disk_is_named_and_a_rerun_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rename = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("mepa_ds.files.os.replace", full)
        with pytest.raises(UserError, match=rf"{name}: the disk or quota is full \(No space left.*\); free some space"):
            make_set(tmp_path / "set", "tokens", [2, 3])
    assert name not in contents(tmp_path / "set")
    assert not list((tmp_path / "set").glob(".*.tmp"))
    make_set(tmp_path / "set", "tokens", [2, 3])
    make_set(tmp_path / "undisturbed", "tokens", [2, 3])
    assert contents(tmp_path / "set") == contents(tmp_path / "undisturbed")


def make_set_and_die(directory: Path, moment: int) -> None:
    """In a forked process: SIGKILL around the n-th of the calls that change what is on the disk."""
    calls = 0

    def die_at_the_moment() -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_and_after(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            die_at_the_moment()
            result = function(*arguments, **options)
            die_at_the_moment()
            return result

        return wrapped

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, before_and_after(getattr(os, name)))
    make_set(directory, "tokens", [3, 2])


@pytest.mark.processes
def test_a_kill_at_any_moment_leaves_complete_shards_and_a_rerun_the_same_bytes(tmp_path: Path) -> None:
    expected_index = make_set(tmp_path / "undisturbed", "tokens", [3, 2])
    expected = contents(tmp_path / "undisturbed")
    for moment in range(1, 100):
        directory = tmp_path / f"killed-{moment}"
        child = os.fork()
        if child == 0:
            try:
                make_set_and_die(directory, moment)
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        whole = {entry.name: entry.sha256 for entry in expected_index.shards}
        for path in directory.glob("shard-*.tar"):
            assert sha256_of_file(path) == whole[path.name]
        if (directory / INDEX_NAME).exists():
            assert len(list(directory.glob("shard-*.tar"))) == 2
        make_set(directory, "tokens", [3, 2])
        assert contents(directory) == expected
    assert moment > 10  # it did die at many moments before it lived


def test_a_torn_plan_is_named_with_the_way_on(tmp_path: Path) -> None:
    ShardWriter(tmp_path, manifest_of())
    (tmp_path / MANIFEST_NAME).write_text((tmp_path / MANIFEST_NAME).read_text()[:20])
    with pytest.raises(
        UserError, match=rf"{MANIFEST_NAME}: cannot be read: .*; nothing was started here, or start it again"
    ):
        read_manifest(tmp_path)


def test_shards_of_unlike_members_make_no_set(tmp_path: Path) -> None:
    """Two jobs with other settings in one directory: a batch could not be stacked."""
    writer = ShardWriter(tmp_path, manifest_of())
    for number, dtype in enumerate((np.uint16, np.int32)):
        sample = {"tokens.npy": npy_bytes(np.zeros(5, dtype)), "cls": b"0"}
        writer.write_shard(f"shard-{number:06d}.tar", [(f"{number}", sample)])
    message = (
        r"shard-000001\.tar: members \.tokens\.npy are int32 \(5,\), in other shards uint16 \(5,\); make the set again"
    )
    with pytest.raises(UserError, match=message):
        writer.finish()
    assert not (tmp_path / INDEX_NAME).exists()
