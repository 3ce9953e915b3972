"""Tiny shard sets that the data tests make in their temporary directories."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mepa_ds.data.shards.index import MadeBy, ShardIndex
from mepa_ds.data.shards.writer import Manifest, Sample, ShardWriter, npy_bytes, shard_name

NUM_CLASSES = 5
CLASSES = tuple(f"class-{label}" for label in range(NUM_CLASSES))
TOKEN_SETTINGS: dict[str, Any] = {"scales": [1, 2], "codebook_size": 64}
FEATURE_SETTINGS: dict[str, Any] = {"codec": "int8", "width": 6}


def png(seed: int, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels).convert(mode), "PNG")


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tokens_of(number: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Five codes that name the sample: the first two are its number in base 64."""
    return np.array([number % 64, number // 64, 1, 2, 3], np.uint16)


def features_of(number: int) -> np.ndarray[Any, np.dtype[np.int8]]:
    return np.random.default_rng(number).integers(-127, 128, (4, 6)).astype(np.int8)


def sample_of(kind: str, number: int) -> Sample:
    key = f"{number:09d}"
    label = str(number % NUM_CLASSES).encode()
    if kind == "images":
        return key, {"png": png(number), "cls": label}
    if kind == "tokens":
        return key, {"tokens.npy": npy_bytes(tokens_of(number)), "cls": label}
    scale = np.full(4, 0.5, np.float32)
    return key, {"features.npy": npy_bytes(features_of(number)), "scale.npy": npy_bytes(scale)}


def make_set(directory: Path, kind: Any, shard_sizes: Sequence[int], **settings: Any) -> ShardIndex:
    """A complete set whose samples are numbered through."""
    defaults = {"images": {}, "tokens": TOKEN_SETTINGS, "features": FEATURE_SETTINGS}[kind]
    names = tuple(shard_name(number) for number in range(len(shard_sizes)))
    made_by = MadeBy(name="test", identity="0123", settings={**defaults, **settings})
    writer = ShardWriter(directory, Manifest(kind=kind, shard_names=names, classes=CLASSES, made_by=made_by))
    start = 0
    for name, size in zip(names, shard_sizes, strict=True):
        writer.write_shard(name, [sample_of(kind, number) for number in range(start, start + size)])
        start += size
    index = writer.finish()
    assert index is not None
    return index
