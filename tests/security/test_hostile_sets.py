"""Indices, offsets and tars that lie: each is refused with one message, in bounded time and memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import INDEX_NAME, ShardIndex, offset_index_path, stored_description
from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.offset_index import scan_tar
from mepa_ds.data.shards.tar import list_members, member_header
from mepa_ds.data.shards.writer import read_npy_header
from mepa_ds.data.training import training_batches
from mepa_ds.data_tools.merge_index import Scan
from mepa_ds.data_tools.readers.idx import Idx
from mepa_ds.errors import DamagedError, UserError
from tests.data.shard_fixtures import make_set
from tests.data.shards.tar_fixtures import END, block, padded, pax


@pytest.fixture(autouse=True)
def _bounded() -> Any:
    """Nothing here may take more than a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6


def change_index(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((directory / INDEX_NAME).read_text())
    change(index)
    (directory / INDEX_NAME).write_text(json.dumps(index))


def entry(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["shards"][0].update(values)


def member(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["members"]["tokens.npy"].update(values)


def settings(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["made_by"]["settings"].update(values)


@pytest.mark.parametrize(
    "change",
    [
        entry(num_samples=10**15),
        entry(num_samples=-5),
        entry(num_samples=2**63),
        entry(num_samples=3 * 10**9, bytes=2**44),
        entry(num_samples=10**9),
        entry(num_samples=10**9, bytes=2**43),
        entry(num_samples=1.5),
        entry(num_samples=7),
        entry(bytes=-1),
        entry(bytes=2**70),
        entry(bytes=10**10),
        lambda index: index["shards"].append(index["shards"][0]),
        lambda index: index["shards"].clear(),
        lambda index: index["members"].update({f"x{number}": {} for number in range(1000)}),
        lambda index: index["members"].update({"../x": {}}),
        member(dtype="object"),
        member(dtype="O"),
        member(dtype="float128"),
        member(dtype=None),
        member(shape=None),
        member(shape=[2**62]),
        member(shape=[-5]),
        member(shape=[5] * 40),
        member(shape=[1 << 27]),
        member(shape=[0]),
        member(shape=[6]),
        member(shape=[]),
        settings(scales=5),
        settings(scales=[]),
        settings(scales=[10**9]),
        settings(scales=["1"]),
        settings(scales=None),
        settings(codebook_size="many"),
        settings(codebook_size=-1),
        settings(codebook_size=1e400),
    ],
)
def test_an_index_that_lies(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    make_set(tmp_path, "tokens", [4])
    change_index(tmp_path, change)
    start = time.monotonic()
    with pytest.raises(UserError):
        next(training_batches(tmp_path, None, global_batch=2, seed=0))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("text", ["[" * 10**6, "[]", "null", "{}", '{"a":' * 500, "\xff", "1e999", '"' + "x" * 100])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_bytes(text.encode("latin-1"))
    for read in (ShardSet, ShardIndex.read):
        with pytest.raises(UserError):
            read(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    (tmp_path / INDEX_NAME).symlink_to("/dev/zero")
    with pytest.raises(UserError, match="cannot be read"):
        ShardSet(tmp_path)


def test_a_message_is_one_however_many_faults_there_are(tmp_path: Path) -> None:
    make_set(tmp_path, "tokens", [1])
    change_index(tmp_path, lambda index: index.update(shards=[{"name": ";"}] * 1000))
    with pytest.raises(UserError, match=r"and \d+ more") as caught:
        ShardSet(tmp_path)
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": lambda a: a + (1 << 40)},
        {"offsets": lambda a: a - (1 << 40)},
        {"offsets": lambda a: np.full_like(a, np.iinfo(np.int64).max)},
        {"offsets": lambda a: a.astype(float)},
        {"offsets": lambda a: a[:2]},
        {"offsets": lambda a: a.ravel()},
        {"offsets": lambda a: a.astype("M8[s]")},
        {"sizes": lambda a: np.full_like(a, -2)},
        {"sizes": lambda a: np.full_like(a, 1 << 40)},
        {"sizes": lambda a: np.full_like(a, np.iinfo(np.int64).max)},
        {"sizes": lambda a: np.zeros_like(a)},
        {"sizes": lambda a: np.full_like(a, 10_000)},
        {"keys": lambda a: a[:1]},
        {"keys": lambda a: np.array([b"\xff" * 9] * len(a))},
        {"keys": lambda a: np.array([b"a\nb\x1b[31m"] * len(a))},
        {"keys": lambda a: np.zeros(len(a))},
        {"keys": lambda a: np.array("x")},
        {"labels": lambda a: a.astype(np.int8)},
        {"labels": lambda a: np.array("x")},
        {"extensions": lambda a: np.array(["x"] * len(a))},
        {"extensions": lambda a: np.arange(len(a))},
        {"extensions": lambda a: np.array("x")},
        {"description": lambda a: np.array("[" * 100_000)},
        {"description": lambda a: np.array("5")},
        {"description": lambda a: np.array(["{}"])},
        {"description": lambda a: np.array(0)},
        {"description": lambda a: np.array('{"entry": {}, "members": {}}')},
    ],
)
def test_offsets_that_lie(tmp_path: Path, change: dict[str, Callable[[Any], Any]]) -> None:
    make_set(tmp_path, "tokens", [4])
    (path,) = tmp_path.glob("*.npz")
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **{name: change.get(name, lambda a: a)(array) for name, array in arrays.items()})
    with pytest.raises(DamagedError, match=r"the offsets cannot be read|its offsets are wrong|the index says|its keys"):
        ShardSet(tmp_path).read(0)
    stored_description(tmp_path / "shard-000000.tar")


def test_offsets_that_unpack_to_gigabytes_or_run(tmp_path: Path) -> None:
    make_set(tmp_path, "tokens", [4])
    (path,) = tmp_path.glob("*.npz")
    whole = path.read_bytes()

    def npy(array_header: str, data: bytes = b"") -> bytes:
        text = array_header.encode().ljust(118)
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data

    bombs = [
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (200000000,)}", bytes(1 << 22)),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"cos\nsystem\n(S'touch MARK'\ntR."),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}"),
        npy("{'descr': '|V0', 'fortran_order': False, 'shape': (99999999999999,)}"),
        npy("{'descr': [('a', '<i8', (99999999,))], 'fortran_order': False, 'shape': (0,)}"),
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
        b"",
    ]
    for bomb in bombs:
        with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for info in source.infolist():
                target.writestr(info.filename, bomb if info.filename == "keys.npy" else source.read(info))
        with pytest.raises(DamagedError, match="the offsets cannot be read"):
            ShardSet(tmp_path).read(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        with target.open("keys.npy", "w", force_zip64=True) as file:
            for _ in range(300):
                file.write(bytes(1 << 20))
        for name in ("extensions", "offsets", "sizes", "labels", "description"):
            target.writestr(f"{name}.npy", b"")
    start = time.monotonic()
    with pytest.raises(DamagedError, match=r"more than the \d+ that are read"):
        ShardSet(tmp_path).read(0)
    assert time.monotonic() - start < 2


def test_names_of_others_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path, "images", [2])
    evil = "a\x1b[2J\nerror: all is lost"
    change_index(
        tmp_path, lambda index: index.update(classes=[evil] * 5, made_by={"name": evil, "settings": {evil: evil}})
    )
    index = ShardIndex.read(tmp_path)
    shown = "a\\x1b[2J\\nerror: all is lost"
    assert index.classes[0] == index.made_by.name == index.made_by.settings[shown] == shown
    left_out = LeftOut.from_json({evil: (3, [evil] * 1000)})
    left_out.note("x")
    assert capsys.readouterr().out.count("\n") == 1
    assert len(left_out.names[shown]) == 5


def test_tars_of_names_that_are_not_plain_say_what_to_do(tmp_path: Path) -> None:
    make_set(tmp_path, "images", [2])
    for path in tmp_path.iterdir():
        path.rename(tmp_path / "my photos.tar") if path.suffix == ".tar" else path.unlink()
    for use in (lambda: ShardSet(tmp_path), Scan(str(tmp_path), workers=0)):
        with pytest.raises(UserError, match=r"'my photos\.tar' is no name of a shard: .*; rename the file"):
            use()
    (tmp_path / "my photos.tar").rename(tmp_path / "my_photos.tar")
    assert len(ShardSet(tmp_path)) == 2
    assert Scan(str(tmp_path), workers=0)().num_samples == 2


TARS = {
    "negative, octal": block("x.png", b"-1000"),
    "negative, base 256": block("x.png", b"\xff" * 12),
    "huge, base 256": block("x.png", b"\x80" + b"\xff" * 11),
    "huge, octal": block("x.png", b"777777777777"),
    "negative, PAX": pax(b"x", b"size=-1536") + block("x.png"),
    "negative, for all": pax(b"g", b"size=-1536") + block("x.png"),
    "huge, PAX": pax(b"x", b"size=" + b"9" * 18) + block("x.png"),
    "digits without end": pax(b"x", b"size=" + b"9" * 1000) + block("x.png"),
    "other digits": pax(b"x", "size=\u0661".encode()) + block("x.png"),
    "an extended header of a gigabyte": block("x", b"10000000000\0", b"x"),
    "a name of a gigabyte": block("x", b"10000000000\0", b"L"),
    "a long name": block("x", b"%011o\0" % 100_000, b"L") + padded(b"a" * 100_000) + block("x.png"),
    "a long PAX name": pax(b"x", b"path=" + b"a" * 100_000) + block("x.png"),
    "a negative extended header": block("x", b"-0000001000\0", b"x"),
    "extended headers without end": pax(b"x", b"comment=x") * 5000,
    "records without end": pax(b"x", *(b"a%d=" % number for number in range(100_000))) + block("x.png"),
    "a folder with a size": block("x/", b"777777777777", b"5") + b"x" * 512,
}


@pytest.mark.parametrize("name", TARS)
def test_tars_that_lie(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.tar").write_bytes(TARS[name] + END)
    start = time.monotonic()
    with pytest.raises(DamagedError):
        list_members(tmp_path / "x.tar", LeftOut())
    assert time.monotonic() - start < 2


def test_records_that_are_not_used_are_not_kept(tmp_path: Path) -> None:
    """Common records of thousands of headers."""
    content = b"".join(pax(b"g", b"a%d=%s" % (number, b"x" * 400)) + block(f"{number}.png") for number in range(2000))
    (tmp_path / "x.tar").write_bytes(content + END)
    start = time.monotonic()
    assert len(list_members(tmp_path / "x.tar", LeftOut())) == 2000
    assert time.monotonic() - start < 5


def test_a_tar_of_terabytes_of_nothing(tmp_path: Path) -> None:
    """Holes behind the end of the archive are not read."""
    path = tmp_path / "x.tar"
    path.write_bytes(member_header("0.png", 0))
    os.truncate(path, 1 << 42)
    start = time.monotonic()
    assert [name for name, _, _ in list_members(path, LeftOut())] == ["0.png"]
    assert time.monotonic() - start < 5


def test_one_long_key_among_many(tmp_path: Path) -> None:
    """Keys are stored as wide as the longest."""
    path, names = tmp_path / "x.tar", [*(f"{number}.png" for number in range(3000)), "d/" * 1900 + "x.png"]
    path.write_bytes(b"".join(member_header(name, 0) for name in names) + END)
    assert scan_tar(path, "images").keys_N.itemsize > 3800
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mepa_ds.data.shards.offset_index._MOST_KEY_BYTES", 1 << 20)
        with pytest.raises(DamagedError, match="the longest of its 3001 keys is too long"):
            scan_tar(path, "images")


def test_members_that_do_not_fit_in_memory(tmp_path: Path) -> None:
    """An image and a label of a terabyte, in holes."""
    for extension, size in (("png", 1 << 40), ("cls", 1 << 30)):
        path = tmp_path / extension / "x.tar"
        path.parent.mkdir()
        other = member_header("0.png", 0) if extension == "cls" else b""
        info = b"0." + extension.encode()
        content = other + block(info.decode(), b"\x80" + size.to_bytes(11, "big"))
        path.write_bytes(content)
        os.truncate(path, len(content) + size + 1024)
        with pytest.raises(DamagedError, match=r"has \d+ bytes; at most \d+ are read"):
            ShardSet(path.parent).read(0)


@pytest.mark.parametrize("change", [{"dtype": "<U4"}, {"dtype": "M8[s]"}, {"dtype": "c16"}, {"order": "F"}])
def test_arrays_of_other_types(change: dict[str, str]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 3), change.get("dtype", "f4"), order=change.get("order", "C")))
    with pytest.raises(ValueError, match="not read"):
        read_npy_header(buffer.getvalue())


def test_zeros_without_end_in_an_idx_file(tmp_path: Path) -> None:
    head = b"\0\0\x08\x03" + np.array([1, 2, 2], ">u4").tobytes()
    with gzip.open(tmp_path / "images", "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(100):
            file.write(bytes(1 << 20))
    with gzip.open(tmp_path / "labels", "wb") as file:
        file.write(b"\0\0\x08\x01" + np.array([1], ">u4").tobytes() + b"\0")
    with pytest.raises(UserError, match="has more than the 4 values that it announces"):
        Idx(tmp_path / "images", tmp_path / "labels").open(None)


def mutations(content: bytes, count: int) -> Any:
    """Cut short, bytes changed, pieces repeated or left out."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        places = np.sort(rng.integers(0, len(content), 3))
        first, second, third = (int(place) for place in places)
        yield content[:first]
        yield content[:first] + bytes([int(rng.integers(256))]) + content[first + 1 :]
        yield content[:first] + content[second:]
        yield content[:second] + content[first:third] + content[third:]


@pytest.mark.parametrize("name", ["index.json", "shard-000000.idx.npz", "shard-000000.tar", "remote.json"])
def test_changed_files_give_no_error_but_ours(tmp_path: Path, name: str) -> None:
    make_set(tmp_path / "set", "tokens", [3])
    if name == "shard-000000.tar":
        offset_index_path(tmp_path / "set" / name).unlink()
    if name == "remote.json":
        remote = {"urls": ["https://127.0.0.1:9/x"], "cache": str(tmp_path / "c"), "cache_gigabytes": 1.0, "window": 1}
        (tmp_path / "set" / name).write_text(json.dumps(remote))
    path, refused = tmp_path / "set" / name, 0
    for changed in mutations(path.read_bytes(), 60):
        path.write_bytes(changed)
        try:
            shards = ShardSet(tmp_path / "set")
            if name != "remote.json":
                shards.read(1)
                next(training_batches(tmp_path / "set", None, global_batch=2, seed=0))
        except UserError:
            refused += 1
    assert refused > 60
    shutil.rmtree(tmp_path / "set")
