"""Small valid files of each kind that strangers give us, and random changes of them."""

from __future__ import annotations

import io
import json
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save

from mepa_ds.config.base import load_config
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.errors import UserError
from mepa_ds.evaluation.feature_spaces import StoredFeatures
from mepa_ds.evaluation.references import Reference
from mepa_ds.images.decoding import decode_image
from mepa_ds.images.sets import ImageFiles
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.project import files as project_files
from mepa_ds.reports.records import read_records
from mepa_ds.scaling.fit_files import read_fits
from mepa_ds.scaling.table import read_table
from mepa_ds.tokenizer.tokenizer import Tokenizer
from mepa_ds.watching.frame import frame
from mepa_ds.watching.run import WatchedRun
from mepa_ds.weights.state_dict_files import read_state_dict
from tests.tiny_run import make_sets, make_tokenizer, recipe_values

Read = Callable[[Path], object]
EXTREMES = (
    "0",
    "-1",
    "1e999",
    "-1e999",
    "9" * 30,
    "9" * 5000,
    "2147483648",
    "9223372036854775807",
    "1e18",
    "null",
    '""',
)
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def make_samples(folder: Path) -> None:
    """One of each kind: the folder `<kind>` of a sample holds all that its reader needs."""
    from mepa_ds.config.model import ModelConfig

    make_sets(folder / "sets", "tiny", count=6)
    (folder / "sets" / "train.tokens").rename(folder / "shards")
    make_tokenizer(folder / "tokenizer")
    config = ModelConfig(depth=1, width=32, num_heads=2, num_classes=3, scales=(1, 2), codebook_size=16, code_width=4)
    NextScaleTransformer(config).save_pretrained(folder / "model")
    for kind in ("safetensors", "torch", "recipe", "run", "references", "features", "images", "archive", "tables"):
        (folder / kind).mkdir()
    (folder / "safetensors" / "a.safetensors").write_bytes(save({"a": torch.ones(2, 3), "b": torch.ones(1)}))
    torch.save({"model": {"a.b": torch.ones(2, 3), "a.c": torch.ones(1)}, "args": {"x": 1}}, folder / "torch" / "a.pth")
    (folder / "recipe" / "a.yaml").write_text(yaml.safe_dump(recipe_values(folder)))
    records = [{"event": "start", "step": 0, "world_size": 1, "device": "cpu"}]
    records += [{"event": "train", "step": n, "loss": 1.5, "ce": 2.5, "loss_scale": [1.0, 2.0]} for n in range(1, 6)]
    records += [{"event": "heldout", "step": 5, "ce": 1.25}]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "run" / "status.json").write_text(json.dumps({"state": "running", "step": 5, "num_steps": 10}))
    statistics: Any = {"mu@x": np.zeros(3), "sigma@x": np.eye(3), "identity@x": np.array("i")}
    np.savez(folder / "references" / "a.npz", **statistics)
    np.save(folder / "features" / "a.npy", np.ones((4, 3), np.float32))
    np.savez(folder / "archive" / "a.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.zeros(2, np.int64))
    for extension in ("png", "jpg", "webp", "tif", "gif", "bmp", "ppm"):
        pixels = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
        Image.fromarray(pixels).save(folder / "images" / f"a.{extension}")
    (folder / "tables" / "a.csv").write_text("run,params_matrix,tokens,loss\na,1e6,1e8,3.5\nb,2e6,2e8,3.0\n")
    (folder / "tables" / "fits.json").write_text(json.dumps({"version": 1, "laws": {"power": {"law": "power"}}}))
    (folder / "tables" / "project.json").write_text(
        json.dumps({"version": 1, "asked": {}, "images": {}, "choices": {}, "files": {"a.csv": "0"}})
    )


def _all_samples(path: Path) -> None:
    samples = ShardSet(path, "tokens")
    for number in range(min(len(samples), 20)):
        samples.read(number)


def _run(path: Path) -> None:
    watched = WatchedRun(path)
    str(frame([watched.look()], 80))
    read_records(path)


def _project(path: Path) -> None:
    if (written := project_files.read(path)) is not None:
        project_files.edited(path, written)


def _reader_of(sample: Path) -> Read:
    """Who reads a file of that folder and suffix; all get the sample's folder or the file itself."""
    by_folder: dict[str, Read] = {
        "shards": lambda path: _all_samples(path.parent),
        "tokenizer": lambda path: Tokenizer.load(path.parent),
        "model": lambda path: NextScaleTransformer.load(path.parent),
        "safetensors": read_state_dict,
        "torch": read_state_dict,
        "recipe": lambda path: load_config(PretrainConfig, path),
        "run": lambda path: _run(path.parent),
        "references": Reference,
        "features": lambda path: StoredFeatures(path, path),
        "images": lambda path: decode_image(path.read_bytes(), path.name),
        "archive": lambda path: list(ImageFiles(path).batches(1)),
    }
    by_name: dict[str, Read] = {
        "a.csv": read_table,
        "fits.json": read_fits,
        "project.json": lambda path: _project(path.parent),
    }
    return by_name.get(sample.name) or by_folder[sample.parent.name]


def samples_in(folder: Path) -> list[tuple[Path, Read]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name in _kinds(folder))
    return [(path, _reader_of(path)) for path in files]


def _kinds(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"sets"}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three random changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_CHANGES)(data, rng)
    return data


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _spliced(data: bytes, rng: random.Random) -> bytes:
    first, second = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:second] + data[first:] if rng.random() < 0.5 else data[:first] + data[second:]


def _with_extreme(data: bytes, rng: random.Random) -> bytes:
    """A number of the text becomes another."""
    found = list(_NUMBER.finditer(data))[:2000]
    if not found:
        return _flipped(data, rng)
    match = rng.choice(found)
    return data[: match.start()] + rng.choice(EXTREMES).encode() + data[match.end() :]


def _with_length(data: bytes, rng: random.Random) -> bytes:
    """Four or eight bytes become an extreme number: lengths and offsets of binary files."""
    size = rng.choice((2, 4, 8))
    value = rng.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1, 2 ** (4 * size)))
    place = rng.randrange(max(len(data) - size, 1))
    return data[:place] + value.to_bytes(size, rng.choice(("little", "big"))) + data[place + size :]


def _nested(data: bytes, rng: random.Random) -> bytes:
    """A value of the text becomes one that is nested deep."""
    depth = rng.choice((3, 200, 20_000))
    first, last = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return _replaced(data, first * depth + b"1" + last * depth, rng)


def _other_kind(data: bytes, rng: random.Random) -> bytes:
    return _replaced(
        data, rng.choice((b"null", b"[]", b"{}", b"true", b'"x"', b'"\\ud800"', b'"../../x"', b"NaN")), rng
    )


def _replaced(data: bytes, value: bytes, rng: random.Random) -> bytes:
    places = list(re.finditer(rb'(?<=: )("[^"]*"|[\d.]+)', data))[:2000]
    if not places:
        return _spliced(data, rng)
    match = rng.choice(places)
    return data[: match.start()] + value + data[match.end() :]


_CHANGES = (_flipped, _cut, _spliced, _with_extreme, _with_length, _nested, _other_kind)


def cases(folder: Path, seed: int, count: int) -> Iterator[tuple[Path, Read, bytes, bytes]]:
    """Yields (file, its reader, its bytes, other bytes), the kinds in turn."""
    rng = random.Random(seed)
    samples = samples_in(folder)
    for number in range(count):
        path, read = samples[number % len(samples)]
        data = path.read_bytes()
        yield path, read, data, _repacked(data, rng) if data[:2] == b"PK" and rng.random() < 0.5 else mutated(data, rng)


def _repacked(data: bytes, rng: random.Random) -> bytes:
    """A zip archive with one member changed, and its checksum right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            content = old.read(name)
            new.writestr(name, mutated(content, rng) if name == chosen else content)
    return out.getvalue()


def outcome(read: Read, path: Path) -> Any:
    """None where it was read, or refused by a message of ours; else the exception."""
    try:
        read(path)
    except UserError:
        return None
    except Exception as error:
        return error
    return None
