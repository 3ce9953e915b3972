"""Files in MNIST's format: Fashion-MNIST where it is installed, else scikit-learn's digits written in it."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FASHION = Path("/usr/share/datasets/fashion-mnist")


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes(), 1) if path.suffix == ".gz" else header + values.tobytes())


def first_images(folder: Path, split: str, count: int) -> tuple[Path, Path]:
    """Writes the first `count` images and labels of a split (train, t10k) to two files and returns their paths."""
    pixels, labels = _fashion(split) if FASHION.is_dir() else _digits(split)
    images, classes = folder / f"{split}-images-idx3-ubyte.gz", folder / f"{split}-labels-idx1-ubyte.gz"
    write_idx(images, pixels[:count])
    write_idx(classes, labels[:count])
    return images, classes


def _fashion(split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    read = [
        gzip.decompress((FASHION / f"{split}-{name}-ubyte.gz").read_bytes()) for name in ("images-idx3", "labels-idx1")
    ]
    return np.frombuffer(read[0], np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(read[1], np.uint8, offset=8)


def _digits(split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.repeat(np.repeat(np.round(data.images * (255 / 16)), 3, axis=1), 3, axis=2).astype(np.uint8)
    chosen = np.arange(len(pixels)) % 6 == 0 if split == "t10k" else np.arange(len(pixels)) % 6 != 0
    return pixels[chosen], data.target[chosen].astype(np.uint8)
