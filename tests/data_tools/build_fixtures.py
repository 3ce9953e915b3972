"""Datasets to build shards from, and a look at what was built."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data_tools.build_shards import BuildOptions, Encoding
from mepa_ds.files import sha256_of_file
from tests.data.shard_fixtures import encode

SYNSETS = ("n01440764", "n01443537", "n02119789")


def options(out: Path, **changes: Any) -> BuildOptions:
    encoding = changes.pop("encoding", Encoding())
    return replace(BuildOptions(out=out, encoding=encoding, shard_samples=4, workers=0), **changes)


def picture(number: int) -> bytes:
    """A JPEG whose mean grey says which it is."""
    return encode(Image.new("RGB", (30 + number % 3, 24), (number * 5,) * 3), "JPEG")


def make_folder(root: Path, per_class: int = 4) -> dict[str, bytes]:
    """ROOT/SYNSET/*.JPEG; returns path -> bytes."""
    files = {}
    for label, synset in enumerate(SYNSETS):
        (root / synset).mkdir(parents=True)
        for number in range(per_class):
            name = f"{synset}/{synset}_{number}.JPEG"
            files[name] = picture(label * per_class + number)
            (root / name).write_bytes(files[name])
    return files


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def contents(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): sha256_of_file(path) for path in directory.rglob("*") if path.is_file()}


def images_of(directory: Path) -> list[tuple[bytes, int]]:
    shards = ShardSet(directory)
    samples = [shards.read(number)[1] for number in range(len(shards))]
    return [(next(data for ext, data in members.items() if ext != "cls"), int(members["cls"])) for members in samples]


def labelled(files: dict[str, bytes]) -> list[tuple[bytes, int]]:
    return [(data, SYNSETS.index(name.split("/")[0])) for name, data in files.items()]


def write_parquet(path: Path, rows: Sequence[tuple[bytes | None, int]], names: tuple[str, ...] = SYNSETS) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [
        None if data is None else {"bytes": data, "path": f"{number}.jpg"} for number, (data, _) in enumerate(rows)
    ]
    table = pyarrow.table({"image": images, "label": pyarrow.array([label for _, label in rows], pyarrow.int64())})
    note = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(note)}), path, row_group_size=3)
