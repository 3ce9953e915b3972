"""Checkpoints from strangers: tables of contents, manifests and run.json that lie."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import random
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from mepa_ds.checkpoint.files import digest, find_damage
from mepa_ds.checkpoint.state import read_state
from mepa_ds.checkpoint.store import read_tensors, stored_tensors
from mepa_ds.errors import UserError

VALUES = torch.arange(10.0)
_ENDS = ((0, 6), (6, 10))


def saved(values: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(values.clone(), file)
    return file.getvalue()


def table(size: Any = (10,), places: Any = None, name: str = "master/w", dtype: Any = torch.float32) -> dcp.Metadata:
    chunks = [dcp.ChunkStorageMetadata(torch.Size([a]), torch.Size([b - a])) for a, b in _ENDS]
    tensors = {name: dcp.TensorStorageMetadata(dcp.TensorProperties(dtype), torch.Size(size), chunks)}
    first, second = (len(saved(VALUES[a:b])) for a, b in _ENDS)
    places = places or [("__0_0.distcp", 0, first), ("__0_0.distcp", first, second)]
    storage = {
        dcp.MetadataIndex(name, torch.Size([a])): _StorageInfo(*place)
        for (a, _), place in zip(_ENDS, places, strict=True)
    }
    return dcp.Metadata(tensors, None, storage, dcp.StorageMeta(Path("/x/y"), "1", "2"))


def write(directory: Path, contents: dcp.Metadata | bytes) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "__0_0.distcp").write_bytes(b"".join(saved(VALUES[a:b]) for a, b in _ENDS))
    data = contents if isinstance(contents, bytes) else pickle.dumps(contents)
    (directory / ".metadata").write_bytes(data)
    return directory


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_whole_checkpoint_is_read(tmp_path: Path, protocol: int) -> None:
    found = read_tensors(write(tmp_path, pickle.dumps(table(), protocol)), ["master/w"])
    assert torch.equal(found["master/w"], VALUES)


_CLASS = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
_HOSTILE = {
    "sets attributes of a class": _CLASS + b"(N}S'polluted'\nI1\nstb.",
    "sets them by another protocol": b"\x80\x04" + _CLASS + b"N}\x8c\x08polluted\x94K\x01s\x86b.",
    "calls a function": b"cos\nsystem\n(S'touch PWNED'\ntR.",
    "calls what it made": b"\x80\x04" + _CLASS + b")\x81)R.",
    "a memo of many gigabytes": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "bytes of many gigabytes": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
    "a key that takes for ever to hash": b"\x80\x04})\x94" + b"h\x00h\x00\x86\x94" * 1 + b"0\x94" + b"}" + b")"
    + b"2\x86" * 60 + b"Ns.",
    "deep": b"\x80\x04" + b"]" * 20_000 + b"a" * 19_999 + b".",
    "empty": b"",
    "no pickle": b"hello",
    "a list": pickle.dumps([1]),
}  # fmt: skip


@pytest.mark.parametrize("kind", _HOSTILE)
def test_hostile_tables_are_one_message(tmp_path: Path, kind: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match="cannot be read"):
        stored_tensors(write(tmp_path, _HOSTILE[kind]))
    assert time.monotonic() - began < 20
    assert not hasattr(dcp.Metadata, "polluted")


_FILE = "__0_0.distcp"
_LIES = {
    "far too large": table(size=(10**18,)),
    "larger than its chunks": table(size=(11,)),
    "outside": table(places=[("../../secret", 0, 4000), (_FILE, 0, 4000)]),
    "absolute": table(places=[("/etc/passwd", 0, 40), (_FILE, 0, 40)]),
    "negative": table(places=[(_FILE, -1, 100), (_FILE, 0, 100)]),
    "beyond the file": table(places=[(_FILE, 0, 10**12), (_FILE, 10**12, 100)]),
    "twice the same bytes": table(places=[(_FILE, 0, 1000), (_FILE, 500, 1000)]),
    "of a type that is larger": table(dtype=torch.complex128, places=[(_FILE, 0, 50), (_FILE, 50, 50)]),
    "a number as text": table(places=[(_FILE, "0", 100), (_FILE, 0, 100)]),
}


@pytest.mark.parametrize("kind", _LIES)
def test_places_that_cannot_be_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=r"\.metadata: cannot be read"):
        read_tensors(write(tmp_path, _LIES[kind]), ["master/w"])


def test_a_file_of_fragments_is_no_link(tmp_path: Path) -> None:
    path = write(tmp_path / "step", table()) / _FILE
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="link"):
        read_tensors(tmp_path / "step", ["master/w"])


def test_no_pickle_of_a_fragment_is_loaded(tmp_path: Path) -> None:
    """Nor is one unpacked: of a fragment, the bytes of its elements are read where they lie."""

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "PWNED"),)

    def archive(how: int) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", how) as made:
            made.writestr("archive/data.pkl", pickle.dumps(Bomb()))
            made.writestr("archive/data/0", VALUES.numpy().tobytes())
        return file.getvalue()

    chunk = dcp.ChunkStorageMetadata(torch.Size([0]), torch.Size([10]))
    tensors = {"w": dcp.TensorStorageMetadata(dcp.TensorProperties(torch.float32), torch.Size([10]), [chunk])}
    for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        data = archive(how)
        places = {dcp.MetadataIndex("w", torch.Size([0])): _StorageInfo(_FILE, 0, len(data))}
        write(tmp_path / str(how), dcp.Metadata(tensors, None, places))
        (tmp_path / str(how) / _FILE).write_bytes(data)
    assert torch.equal(read_tensors(tmp_path / "0", ["w"])["w"], VALUES)
    with pytest.raises(UserError, match="no archive of one tensor"):
        read_tensors(tmp_path / "8", ["w"])
    assert not (tmp_path / "PWNED").exists()


def test_changed_tables_and_fragments_are_one_message_or_numbers(tmp_path: Path) -> None:
    chance = random.Random(0)
    whole = pickle.dumps(table())
    codes = [code.code.encode("latin-1") for code in pickletools.opcodes]
    write(tmp_path, whole)
    fragments = (tmp_path / _FILE).read_bytes()
    for number in range(200):
        path, data = ((tmp_path / ".metadata", whole), (tmp_path / _FILE, fragments))[number % 2]
        changed = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(changed))
            changed[place : place + 1] = chance.choice([b"", os.urandom(1), chance.choice(codes)])
        path.write_bytes(changed)
        try:
            read_tensors(tmp_path, ["master/w"])
        except UserError:
            pass
        path.write_bytes(data)


def manifest(directory: Path, files: dict[str, Any]) -> Path:
    (directory / "manifest.json").write_text(json.dumps({"files": files}))
    return directory


def test_a_manifest_names_files_of_its_checkpoint(tmp_path: Path) -> None:
    step = write(tmp_path / "step_00000001", table())
    (step / "run.json").write_text("{}")
    (tmp_path / "secret").write_text("secret")
    files: dict[str, Any] = {name: digest(step / name) for name in (".metadata", "run.json", _FILE)}
    assert find_damage(manifest(step, files)) is None
    assert "does not list" in str(find_damage(manifest(step, {})))
    for name in ("../secret", "/etc/passwd", "..", "a/b", ""):
        assert "no name of a checkpoint's file" in str(find_damage(manifest(step, {**files, name: files["run.json"]})))
    for size in (-1, "6", 1e300, None, True):
        assert find_damage(manifest(step, {**files, _FILE: {"bytes": size, "sha256": "0"}})) is not None
    (step / "zero").symlink_to("/dev/zero")
    assert "link" in str(find_damage(manifest(step, {**files, "zero": {"bytes": 0, "sha256": "0"}})))
    os.mkfifo(step / "pipe")
    assert "no regular file" in str(find_damage(manifest(step, {**files, "pipe": {"bytes": 0, "sha256": "0"}})))
    for text in ("[" * 100_000, "[]", '{"files": 3}', "nonsense"):
        (step / "manifest.json").write_text(text)
        assert find_damage(step) is not None
    (step / "manifest.json").unlink()
    (step / "manifest.json").symlink_to("/dev/zero")
    assert find_damage(step) is not None


_RUNS = (
    "[]", "3", "[" * 100_000, '{"step": "1"}', '{"step": -1}', '{"step": true}', '{"recipe": []}', '{"class_names": [1]}',
    '{"loss_scaler": {"a": "b"}}', '{"unknown": 1}', '{"step": 1' + "0" * 5000 + "}", "{",
)  # fmt: skip


@pytest.mark.parametrize("text", _RUNS, ids=range(len(_RUNS)))
def test_a_run_json_that_is_none_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        read_state(tmp_path)
