"""Image sets for tests of the precompute tool."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mepa_ds.data.shards.index import MadeBy
from mepa_ds.data.shards.writer import Manifest, ShardWriter

SIDE, SHARD_SIZES = 16, (7, 5, 6)


def picture(number: int, height: int = SIDE, width: int = SIDE) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)).resize((width, height))


def write_images(
    directory: Path, height: int = SIDE, width: int = SIDE, damaged: int | None = None, first_label: int = 0
) -> Path:
    names = tuple(f"shard-{number:06d}.tar" for number in range(len(SHARD_SIZES)))
    manifest = Manifest(kind="images", shard_names=names, classes=("a", "b"), made_by=MadeBy(name="test"))
    writer, number = ShardWriter(directory, manifest), 0
    for name, size in zip(names, SHARD_SIZES, strict=True):
        samples = []
        for _ in range(size):
            buffer = io.BytesIO()
            picture(number, height, width).save(buffer, "png")
            data = b"not an image" if number == damaged else buffer.getvalue()
            samples.append((f"n{number:04d}", {"png": data, "cls": str((number + first_label) % 2).encode()}))
            number += 1
        writer.write_shard(name, samples)
    writer.finish()
    return directory
