"""Many images on disk: an .npz with `arr_0` as ADM's evaluation suite reads it, or a directory of PNGs."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from mepa_ds.errors import UserError
from mepa_ds.files import atomic_path

_MEMBER = "arr_0.npy"
_WANTED = "expected a directory of PNG files, or an .npz whose arr_0 is uint8 of shape (N, H, W, 3)"


class ImageFiles:
    """uint8 images of one size, `shape` (N, H, W, 3). Holds none of them: 50 000 of 256 pixels are 10 GB.

    Raises:
        UserError: at construction, for what is no such set; while reading, for an image of another size.
    """

    def __init__(self, path: Path):
        self._path = path
        self._names: Sequence[Path] = ()
        if path.is_dir():
            self._names = sorted(path.glob("*.png"))
            if not self._names:
                raise UserError(f"{path}: no PNG files in this directory; {_WANTED}")
            self.shape: tuple[int, ...] = (len(self._names), *read_pixels(self._names[0]).shape)
            return
        with _open_member(path) as file:
            self.shape = _read_header(file, path)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """(B, H, W, 3) each, in the file's order, or in the order of the files' names."""
        if self._names:
            for start in range(0, len(self), size):
                yield np.stack(
                    [_sized(name, self.shape[1:], self._names[0]) for name in self._names[start : start + size]]
                )
            return
        with _open_member(self._path) as file:
            _read_header(file, self._path)
            for start in range(0, len(self), size):
                shape = (min(size, len(self) - start), *self.shape[1:])
                yield np.frombuffer(self._read(file, int(np.prod(shape))), np.uint8).reshape(shape)

    def _read(self, file: IO[bytes], count: int) -> bytes:
        try:
            data = file.read(count)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self._path}: arr_0 cannot be read ({error}); make the file again") from error
        if len(data) < count:
            raise UserError(f"{self._path}: arr_0 is cut off; make the file again")
        return data


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) of an image file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"{path}: not an image that can be read: {error}") from error


def write_npz(path: Path, images: Sequence[Path]) -> None:
    """The images as `arr_0` of `path`, one by one: never more than one of them is in memory.

    Raises:
        UserError: an image cannot be read or has another size than the first.
    """
    first = read_pixels(images[0])
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *first.shape)}
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open(_MEMBER, "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_2_0(file, header)  # type: ignore[arg-type]
        for name in tqdm(images, desc="packing", unit="image", disable=None):
            file.write(_sized(name, first.shape, images[0]).tobytes())


def _sized(name: Path, shape: tuple[int, ...], model: Path) -> NDArray[np.uint8]:
    pixels = read_pixels(name)
    if pixels.shape != shape:
        raise UserError(f"{name}: {pixels.shape}, but {model} is {shape}; all images must have one size")
    return pixels


def _open_member(path: Path) -> IO[bytes]:
    try:
        return zipfile.ZipFile(path).open(_MEMBER)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{path}: {error}; {_WANTED}") from error


def _read_header(file: IO[bytes], path: Path) -> tuple[int, ...]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
    except ValueError as error:
        raise UserError(f"{path}: arr_0 is no array: {error}; {_WANTED}") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order or not shape[0]:
        raise UserError(f"{path}: arr_0 is {dtype} of shape {shape}; {_WANTED}")
    return shape
