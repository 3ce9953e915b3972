"""Many images on disk: an .npz with `arr_0` as ADM's evaluation suite reads it, or a directory of image files."""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from mepa_ds import log
from mepa_ds.errors import DamagedError, UserError
from mepa_ds.files import atomic_path, check_regular, read_file, why_unreadable
from mepa_ds.images.decoding import decode_image, is_image_name
from mepa_ds.progress import Progress
from mepa_ds.safety.pictures import MOST_PIXELS
from mepa_ds.safety.reading import read_archive

_MEMBER, _LABELS = "arr_0.npy", "arr_1"
_MOST_DIGITS = 6  # of a class's number; longer ones, such as dates and WordNet's numbers, are names
_LABELLED = re.compile(rf"class(\d{{1,{_MOST_DIGITS}}})_")
_WANTED = "expected a directory of image files, or an .npz whose arr_0 is uint8 of shape (N, H, W, 3)"
_SHOWN = 5
# Encrypted archives and unknown compression raise RuntimeError.
_UNREADABLE = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class ImageFiles:
    """uint8 images of one size, `shape` (N, H, W, 3). They stay on disk: 50 000 images of 256 pixels are 10 GB.

    In a directory all image files count, in the order of their names; other files are listed in the log. A directory
    that has only folders of images is one of class folders. `labels` are those of class folders (their numbers if all
    are named by numbers, else their places in the order of names), of names such as `class0003_00012.png`, which
    `mepa sample` writes, or the .npz's `arr_1`; None where there are none. `classes`: the names of class folders.

    Raises:
        UserError: at construction, if the path is no such set; while reading, for an image of another size.
    """

    def __init__(self, path: Path):
        self._path = path
        self._names: Sequence[Path] = ()
        self.classes: tuple[str, ...] = ()
        self.labels: NDArray[np.int64] | None = None
        if path.is_dir():
            self._names = _images_in(path)
            if not self._names:
                self._names, self.labels, self.classes = _class_folders(path)
            else:
                self.labels = _labels_of(self._names)
            self.shape: tuple[int, ...] = (len(self._names), *read_pixels(self._names[0]).shape)
            return
        with _open_member(path) as file:
            self.shape = _read_header(file, path)
        self.labels = _labels_in(path, len(self))

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
        except _UNREADABLE as error:
            raise UserError(f"{self._path}: arr_0 cannot be read ({error}); make the file again") from error
        if len(data) < count:
            raise UserError(f"{self._path}: arr_0 is cut off; make the file again")
        return data


def _images_in(directory: Path) -> list[Path]:
    names, others = list[Path](), list[str]()
    for entry in os.scandir(directory):
        if is_image_name(entry.name) and not entry.is_dir():
            names.append(directory / entry.name)
        else:
            others.append(entry.name.encode("utf-8", "backslashreplace").decode())
    if others:
        shown = ", ".join(sorted(others)[:_SHOWN]) + (", ..." if len(others) > _SHOWN else "")
        log.note(f"{directory}: {len(others)} files or folders not named as images are left out ({shown})")
    return sorted(names)


def _class_folders(directory: Path) -> tuple[list[Path], NDArray[np.int64], tuple[str, ...]]:
    """Images, their labels, and the names of the folders, those without images too."""
    folders = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    numbered = is_numbered([folder.name for folder in folders])
    if numbered:
        folders.sort(key=lambda folder: int(folder.name))
    names, labels = list[Path](), list[int]()
    for place, folder in enumerate(folders):
        mine = _images_in(folder)
        names += mine
        labels += [int(folder.name) if numbered else place] * len(mine)
    if not names:
        raise UserError(f"{directory}: no image files in this directory or in its folders; {_WANTED}")
    return names, np.array(labels, np.int64), tuple(folder.name for folder in folders)


def is_numbered(names: Sequence[str]) -> bool:
    """Whether class folders are named by the numbers of their classes."""
    return bool(names) and all(name.isdecimal() and len(name) <= _MOST_DIGITS for name in names)


def _labels_of(names: Sequence[Path]) -> NDArray[np.int64] | None:
    """As the names of files give them, if all do."""
    found = [match[1] for name in names if (match := _LABELLED.match(name.name))]
    return np.array(found, np.int64) if len(found) == len(names) else None


def _labels_in(path: Path, count: int) -> NDArray[np.int64] | None:
    """`arr_1` of an .npz, as ADM's samples have it; None where there is none."""
    try:
        with open(path, "rb") as file:
            if f"{_LABELS}.npy" not in zipfile.ZipFile(file).namelist():
                return None
            labels = read_archive(file, [_LABELS])[_LABELS]
    except Exception as error:  # damaged bytes raise almost anything
        raise UserError(f"{path}: {_LABELS} cannot be read ({error}); make the file again") from error
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path}: {_LABELS} is {labels.dtype} of shape {labels.shape}; expected one whole number for each of the "
            f"{count} images, its class"
        )
    if labels.min() < 0 or labels.max() >= 10**_MOST_DIGITS:
        raise UserError(
            f"{path}: {_LABELS} has classes from {labels.min()} to {labels.max()}; expected numbers from 0 on. Leave "
            f"{_LABELS} out if the classes are not known"
        )
    return labels.astype(np.int64)


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) of an image file, the same as training sees (`decode_image`).

    Raises:
        DamagedError: it cannot be read.
    """
    try:
        data = read_file(path)
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {why_unreadable(path, error)}") from error
    return np.asarray(decode_image(data, str(path)))


def write_npz(path: Path, images: Sequence[Path]) -> None:
    """The images as `arr_0` of `path`, one by one: never more than one of them is in memory; and as `arr_1` the labels,
    if all names have one (`class0003_00012.png`).

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
        for name in Progress(images, desc="packing", unit="image"):
            file.write(_sized(name, first.shape, images[0]).tobytes())
        if (labels := _labels_of(images)) is not None:
            file.close()
            with archive.open(f"{_LABELS}.npy", "w") as file:
                np.lib.format.write_array(file, labels, allow_pickle=False)


def _sized(name: Path, shape: tuple[int, ...], model: Path) -> NDArray[np.uint8]:
    pixels = read_pixels(name)
    if pixels.shape != shape:
        raise UserError(f"{name}: {pixels.shape}, but {model} is {shape}; all images must have one size")
    return pixels


def _open_member(path: Path) -> IO[bytes]:
    try:
        check_regular(path)
        return zipfile.ZipFile(path).open(_MEMBER)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {why_unreadable(path, error)}; {_WANTED}") from error
    except (*_UNREADABLE, KeyError) as error:
        raise UserError(f"{path}: {error}; {_WANTED}") from error


def _read_header(file: IO[bytes], path: Path) -> tuple[int, ...]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
    except Exception as error:  # of a literal of Python's with anything in it: a dozen kinds
        raise UserError(f"{path}: arr_0 is no array: {error}; {_WANTED}") from error
    if fortran_order and dtype == np.uint8:
        raise UserError(f"{path}: arr_0 is in Fortran order; save numpy.ascontiguousarray(images) instead")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise UserError(f"{path}: arr_0 is {dtype} of shape {shape}; {_WANTED}")
    if shape[1] * shape[2] > MOST_PIXELS:
        raise UserError(
            f"{path}: arr_0 has images of {shape[2]} x {shape[1]} pixels, more than {MOST_PIXELS}; {_WANTED}"
        )
    return shape
