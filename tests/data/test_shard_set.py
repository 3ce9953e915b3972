"""Random access to shards, and what it says about damaged ones."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mepa_ds.data.order import OrderedStream, SampleOrder
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import (
    INDEX_NAME,
    MadeBy,
    offset_index_path,
    read_description,
    read_offset_index,
)
from mepa_ds.data.shards.writer import Manifest, ShardWriter, npy_bytes
from mepa_ds.data_tools.merge_index import Scan
from mepa_ds.errors import DamagedError, UserError
from tests.data.shard_fixtures import features_of, make_set, sample_of, tokens_of


@pytest.fixture
def tokens(tmp_path: Path) -> ShardSet:
    make_set(tmp_path / "tokens", "tokens", [4, 0, 3])
    return ShardSet(tmp_path / "tokens", "data.tokens")


def test_samples_by_number(tokens: ShardSet) -> None:
    assert len(tokens) == 7
    for number in range(7):
        key, members = sample_of("tokens", number)
        assert tokens.read(number) == (key, members)
        assert tokens.key(number) == key
    with pytest.raises(IndexError):
        tokens.read(7)


def test_arrays_and_labels_in_any_order(tokens: ShardSet) -> None:
    samples = np.array([6, 0, 3, 0])
    out = np.empty((4, 5), np.uint16)
    tokens.read_arrays(samples, "tokens.npy", out)
    np.testing.assert_array_equal(out, [tokens_of(number) for number in samples])
    assert tokens.read_labels(samples).tolist() == [1, 0, 3, 0]
    assert tokens.keys(samples) == [b"000000006", b"000000000", b"000000003", b"000000000"]


def test_one_view_of_several(tmp_path: Path) -> None:
    make_set(tmp_path, "features", [5])
    features, out = ShardSet(tmp_path), np.empty((3, 6), np.int8)
    samples, rows = np.array([4, 1, 2]), np.array([0, 3, 1])
    features.read_arrays(samples, "features.npy", out, rows)
    np.testing.assert_array_equal(out, [features_of(int(s))[r] for s, r in zip(samples, rows, strict=True)])


def test_pickles_and_forgets_its_files(tokens: ShardSet) -> None:
    tokens.read(0)
    assert pickle.loads(pickle.dumps(tokens)).read(5) == tokens.read(5)


def test_threads_that_meet_at_a_shards_table_see_all_of_it(tokens: ShardSet) -> None:
    """Both find the offset index missing; the slower one takes it over while the faster one reads by it."""
    places, samples_B = tokens._places, np.arange(len(tokens))
    _, _, expected_BM = places.members(samples_B)
    offset_index = read_offset_index(tokens.shard_paths[0], "tokens")
    ended = threading.Event()

    def take_over() -> None:
        while not ended.is_set():
            places.add(0, offset_index)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=take_over)
    thread.start()
    try:
        for _ in range(3000):
            np.testing.assert_array_equal(places.members(samples_B)[2], expected_BM)
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(before)


def test_a_set_without_stored_offsets_is_read_alike(tmp_path: Path) -> None:
    make_set(tmp_path, "tokens", [4])
    offset_index_path(tmp_path / "shard-000000.tar").unlink()
    assert ShardSet(tmp_path).read(2) == sample_of("tokens", 2)


def test_arrays_that_another_writer_laid_out(tmp_path: Path) -> None:
    """A version 2.0 .npy header is longer than ours."""
    make_set(tmp_path, "tokens", [1])
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, tokens_of(3), version=(2, 0))
    with tarfile.open(tmp_path / "shard-000000.tar", "w") as tar:
        for name, data in (("000000000.tokens.npy", buffer.getvalue()), ("000000000.cls", b"3")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    offset_index_path(tmp_path / "shard-000000.tar").unlink()
    out = np.empty((1, 5), np.uint16)
    ShardSet(tmp_path).read_arrays(np.array([0]), "tokens.npy", out)
    np.testing.assert_array_equal(out[0], tokens_of(3))


def test_a_file_cut_short_while_open_is_an_error_not_a_crash(tokens: ShardSet) -> None:
    tokens.read(0)
    path = tokens.shard_paths[0]
    with open(path, "r+b") as file:
        file.truncate(2000)
    with pytest.raises(DamagedError, match=r"shard-000000\.tar: sample '000000003': the shard ends inside it"):
        tokens.read(3)


@pytest.mark.parametrize("action", ["truncate", "remove", "other array", "other offset index", "other keys"])
def test_damage_is_named(tokens: ShardSet, action: str) -> None:
    path, out = tokens.shard_paths[0], np.empty((1, 5), np.uint16)
    content = path.read_bytes()
    if action == "truncate":
        path.write_bytes(content[:5000])
        message = "has 5000 bytes, the index says 10240"
    elif action == "remove":
        path.unlink()
        message = "No such file"
    elif action == "other array":
        path.write_bytes(content.replace(npy_bytes(tokens_of(1))[:128], npy_bytes(np.zeros(5, np.int16))[:128]))
        message = r"sample '000000000': \.tokens\.npy holds int16 \(5,\), expected uint16"
    elif action == "other keys":
        make_set(path.parent.parent / "other", "tokens", [1, 4])
        other = path.parent.parent / "other" / "shard-000001.tar"
        offset_index_path(path).write_bytes(offset_index_path(other).read_bytes())
        message = "its keys are not those of the index"
    else:
        make_set(path.parent.parent / "other", "tokens", [3])
        offset_index_path(path).write_bytes(offset_index_path(path.parent.parent / "other" / path.name).read_bytes())
        message = "has 3 samples, the index says 4"
    with pytest.raises(DamagedError, match=message):
        tokens.read_arrays(np.array([0]), "tokens.npy", out)


@pytest.mark.parametrize(
    ("label", "message"), [(b"5", "label 5 is out of range"), (b"x", "is no number"), (b"", "is no number")]
)
def test_labels_are_checked(tmp_path: Path, label: bytes, message: str) -> None:
    make_set(tmp_path, "tokens", [1])
    path = tmp_path / "shard-000000.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("000000000.cls")
        info.size = len(label)
        tar.addfile(info, io.BytesIO(label))
    offset_index_path(path).unlink()
    with pytest.raises(DamagedError, match=f"sample '000000000': .*{message}"):
        ShardSet(tmp_path).read_labels(np.array([0]))


def test_a_set_that_is_not_finished_is_not_opened(tmp_path: Path) -> None:
    manifest = Manifest(kind="images", shard_names=("a.tar", "b.tar"), made_by=MadeBy(name="test"))
    ShardWriter(tmp_path, manifest).write_shard("a.tar", [sample_of("images", 0)])
    with pytest.raises(UserError, match=r"no index\.json there; if a job is still writing.*mepa data merge DIR"):
        ShardSet(tmp_path)
    with pytest.raises(UserError, match="holds a set that is not finished"):
        Scan(str(tmp_path), workers=0)()


def damaged_tables(content: bytes) -> Iterator[bytes]:
    """Empty, cut short anywhere, one byte changed anywhere (a sample of each)."""
    yield b""
    rng = np.random.default_rng(0)
    for place in rng.integers(1, len(content), 40).tolist():
        yield content[:place]
    for place in [0, *rng.integers(0, len(content), 200).tolist()]:
        yield content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def test_a_damaged_table_is_named_or_harmless(tokens: ShardSet) -> None:
    """Never a traceback, never other samples: harmless are bytes that say nothing, such as the zip's times."""
    path, whole = tokens.shard_paths[0], tokens.read(2)
    content, named = offset_index_path(path).read_bytes(), 0
    for damaged in damaged_tables(content):
        offset_index_path(path).write_bytes(damaged)
        message = ""
        try:
            assert ShardSet(tokens.directory, "data.tokens").read(2) == whole
        except DamagedError as error:
            message = str(error)
        if message:
            assert re.match(r"data\.tokens: .*shard-000000\.idx\.npz: the offsets cannot be read: .*remove", message)
            assert read_description(path) is None  # counts as missing, so the tool that made it makes it again
            named += 1
    assert named > 150


def test_a_missing_set_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokens: .*nowhere: no such directory"):
        ShardSet(tmp_path / "nowhere", "data.tokens")
    with pytest.raises(UserError, match=r"data\.tokens: .*: no index\.json there"):
        ShardSet(tmp_path, "data.tokens")
    (tmp_path / INDEX_NAME).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        ShardSet(tmp_path)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"kind": "images", "shards": [], "members": {}, "extra": 1}))
    with pytest.raises(UserError, match="made_by: required"):
        ShardSet(tmp_path)


def test_a_set_of_imagenets_size_opens_without_touching_a_shard(tmp_path: Path) -> None:
    make_set(tmp_path, "tokens", [1])
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    entry = {**index["shards"][0], "num_samples": 1000}
    index["shards"] = [{**entry, "name": f"shard-{number:06d}.tar"} for number in range(1282)]
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    for path in tmp_path.glob("shard-*"):
        path.unlink()
    start = time.process_time()
    shards = ShardSet(tmp_path)
    samples = OrderedStream(SampleOrder(shards.shard_sizes, 0)).samples_at(np.arange(768))
    assert len(set((samples // 1000).tolist())) > 500
    assert time.process_time() - start < 5
