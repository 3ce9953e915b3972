"""Images for tests of scores: scikit-learn's digits, as arrays, folders and shards, and a space for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from mepa_ds.data.shards.index import MadeBy
from mepa_ds.data.shards.writer import Manifest, ShardWriter, shard_name
from mepa_ds.teachers.patch_pca import PatchPca, PatchPcaConfig
from tests.data.shard_fixtures import encode


def digits(first: int, count: int) -> NDArray[np.uint8]:
    """(count, 32, 32, 3)"""
    pixels = (load_digits().images[first : first + count] * 15.9).astype(np.uint8)
    return np.repeat(pixels.repeat(4, 1).repeat(4, 2)[..., None], 3, axis=3)


def labels(first: int, count: int) -> NDArray[np.int64]:
    return load_digits().target[first : first + count].astype(np.int64)


def write_folder(folder: Path, first: int, count: int, named: bool = True) -> Path:
    """PNG files as `mepa sample` names them."""
    folder.mkdir(parents=True)
    for number, (pixels, label) in enumerate(zip(digits(first, count), labels(first, count), strict=True)):
        name = f"class{label:04d}_{number:05d}" if named else f"{number:05d}"
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def write_pca(directory: Path) -> Path:
    """A patch-pca teacher of 4 x 4 cells, of width 6."""
    images_B3HW = torch.from_numpy(digits(0, 200)).permute(0, 3, 1, 2).float() / 127.5 - 1
    PatchPca.fit([images_B3HW], PatchPcaConfig(grid_side=4, width=6)).save(directory)
    return directory


def write_shards(directory: Path, first: int, count: int) -> Path:
    classes = tuple(map(str, range(10)))
    manifest = Manifest(kind="images", shard_names=(shard_name(0),), classes=classes, made_by=MadeBy(name="test"))
    writer = ShardWriter(directory, manifest)
    samples = [
        (f"{number:09d}", {"png": encode(Image.fromarray(pixels), "PNG"), "cls": str(label).encode()})
        for number, (pixels, label) in enumerate(zip(digits(first, count), labels(first, count), strict=True))
    ]
    writer.write_shard(shard_name(0), samples)
    assert writer.finish() is not None
    return directory
