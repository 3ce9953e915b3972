"""IDX files, the format of MNIST and of its successors (Fashion-MNIST, KMNIST, EMNIST): grey images, labels apart."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mepa_ds.errors import UserError
from mepa_ds.files import check_regular, why_unreadable

_UNSIGNED_BYTES = 0x08
_MOST_VALUES = 1 << 32
"""Six times as many as the largest of MNIST's successors has (EMNIST: 800 000 images of 784 pixels)."""


@dataclass(frozen=True)
class Idx:
    """MNIST's format, as Fashion-MNIST has it. Images get a black border and become RGB."""

    images: Path
    """File of the images, such as train-images-idx3-ubyte.gz; uncompressed files are read too."""
    labels: Path
    """File of their labels, such as train-labels-idx1-ubyte.gz."""
    side: int = 32
    """Pixels of a stored image. What is missing is added as a black border on all sides."""
    first: int | None = None
    """Only so many images, from the start of the files [default: all]."""

    def open(self, scratch: Path | None) -> IdxSource:
        pixels_NHW, labels_N = _read(self.images, 3), _read(self.labels, 1)
        if len(pixels_NHW) != len(labels_N):
            raise UserError(
                f"{self.images} has {len(pixels_NHW)} images, but {self.labels} has {len(labels_N)} labels; "
                "give the two files of one split"
            )
        if max(pixels_NHW.shape[1:]) > self.side:
            raise UserError(
                f"--side {self.side}: the images of {self.images} are {pixels_NHW.shape[2]} x {pixels_NHW.shape[1]} "
                "pixels; give at least as many"
            )
        if self.first is not None and not 0 < self.first <= len(labels_N):
            raise UserError(f"--first {self.first}: {self.images} has {len(labels_N)} images; give 1 to that many")
        return IdxSource(pixels_NHW[: self.first], labels_N[: self.first], self)


class IdxSource:
    name = "idx"

    def __init__(self, pixels_NHW: NDArray[np.uint8], labels_N: NDArray[np.uint8], options: Idx):
        self._pixels, self._labels, self._side = pixels_NHW, labels_N, options.side
        self.settings: dict[str, Any] = {"side": options.side}
        if options.first is not None:
            self.settings["first"] = options.first
        self.classes = tuple(str(label) for label in range(int(labels_N.max()) + 1 if len(labels_N) else 0))

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, number: int) -> int:
        return int(self._labels[number])

    def describe(self, number: int) -> str:
        # The format has no names, so an image stands for itself.
        return f"image {number}, CRC {zlib.crc32(self._pixels[number].tobytes()):08x}"

    def load(self, number: int) -> tuple[str, bytes]:
        height, width = self._pixels[number].shape
        image = Image.new("RGB", (self._side, self._side))
        image.paste(Image.fromarray(self._pixels[number]), ((self._side - width) // 2, (self._side - height) // 2))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return "png", buffer.getvalue()


def _read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Returns the array of an IDX file: two zero bytes, type, number of dimensions, sizes (big-endian), values."""
    try:
        check_regular(path)
        with open(path, "rb") as packed:
            is_packed = packed.read(2) == b"\x1f\x8b"
        # Only what the sizes at its start announce is unpacked, and a byte more: gzip makes a terabyte of a gigabyte.
        with gzip.open(path) if is_packed else open(path, "rb") as file:
            head = file.read(4 + 4 * dimensions)
            announced = math.prod(np.frombuffer(head, ">u4", offset=4).tolist()) if _is_idx(head, dimensions) else 0
            content = head + file.read(min(announced, _MOST_VALUES) + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: is no whole gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {why_unreadable(path, error)}") from error
    if not _is_idx(content, dimensions):
        what = "images (idx3-ubyte)" if dimensions == 3 else "labels (idx1-ubyte)"
        raise UserError(f"{path}: is no IDX file of {what}; give the files as MNIST names them")
    sizes = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if len(values) != math.prod(sizes):
        found = f"{len(values)} of" if len(values) < announced else "more than"
        raise UserError(f"{path}: has {found} the {math.prod(sizes)} values that it announces; fetch it again")
    return values.reshape(sizes)


def _is_idx(content: bytes, dimensions: int) -> bool:
    """Whether these bytes begin an IDX file of so many dimensions."""
    return content[:4] == bytes((0, 0, _UNSIGNED_BYTES, dimensions)) and len(content) >= 4 + 4 * dimensions
