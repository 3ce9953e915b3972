"""What samples are compared with: ADM's file, statistics alone, a folder, an .npz of images, or a shard set.

Everything that can be known without a network is checked when a reference is opened.

Shapes: N images, D features.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mepa_ds.data.images import decode_sample, where_of
from mepa_ds.data.shard_set import ShardSet, parse_label, spread
from mepa_ds.data.shards.index import INDEX_NAME
from mepa_ds.data.shards.samples import IMAGE_EXTENSIONS, LABEL_EXTENSION
from mepa_ds.errors import UserError
from mepa_ds.evaluation.formulas.checks import LARGEST
from mepa_ds.evaluation.formulas.gaussian import Gaussian, covariance_fault
from mepa_ds.evaluation.inception import POOL_WIDTH, SPATIAL, SPATIAL_WIDTH
from mepa_ds.evaluation.space import INCEPTION
from mepa_ds.files import check_regular, why_unreadable
from mepa_ds.images.resizing import adm_center_crop
from mepa_ds.images.sets import ImageFiles
from mepa_ds.machine import usable_cpus
from mepa_ds.safety.reading import read_archive

MOST_IMAGES = 50_000
"""Of a shard set, which may hold millions: this many, evenly spread."""

ADM_NAMES = {INCEPTION: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
_WIDTHS = {INCEPTION: POOL_WIDTH, SPATIAL: SPATIAL_WIDTH}
_IDENTITY = "identity@"
_MOST_RATIO, _SLACK = 100, 1 << 28
"""How much an archive's arrays may be larger than it: images and statistics hardly shrink at all."""


class Images(Protocol):
    """Images of one size on disk: `ImageFiles`, or `ShardImages`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)"""

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """uint8 (B, H, W, 3) each."""


class ShardImages:
    """The images of a shard set, cropped and resized as ADM's references are; at most `most`, evenly spread.

    Args:
        side: None is the side of the first image, if it is square; all must then have it.

    Raises:
        UserError: no set of images there; while reading, for a damaged image.
    """

    def __init__(self, path: Path, side: int | None = None, most: int | None = MOST_IMAGES):
        self._set = ShardSet(path, "images")
        if not set(IMAGE_EXTENSIONS) & self._set.index.members.keys():
            raise UserError(f"{path}: holds {sorted(self._set.index.members)}, no images; give the image set")
        count = len(self._set)
        if not count:
            raise UserError(f"{path}: this set is empty")
        most = count if most is None else min(most, count)
        self._samples = spread(count, most)
        self.num_available = count
        self.classes = tuple(self._set.index.classes)
        first = decode_sample(self._set, *self._set.read(0))
        if side is None and first.width != first.height:
            raise UserError(f"{path}: the first image has {first.width} x {first.height} pixels; give --image-side")
        self._given, self._side = side is not None, side or first.width
        self.shape: tuple[int, ...] = (most, self._side, self._side, 3)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[NDArray[np.uint8]]:
        for pixels_BHW3, _ in self.labelled_batches(size):
            yield pixels_BHW3

    def labelled_batches(self, size: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """Pixels (B, S, S, 3) and labels (B,), -1 where there are none."""
        with ThreadPoolExecutor(usable_cpus()) as pool:
            for first in range(0, len(self), size):
                read = list(pool.map(self._read, self._samples[first : first + size]))
                yield np.stack([pixels for pixels, _ in read]), np.array([label for _, label in read], np.int64)

    def _read(self, sample: int) -> tuple[NDArray[np.uint8], int]:
        key, members = self._set.read(sample)
        image = decode_sample(self._set, key, members)
        if not self._given and image.size != (self._side, self._side):
            raise UserError(
                f"{where_of(self._set, key)} has {image.width} x {image.height} pixels, the first one {self._side} x "
                f"{self._side}; give --image-side"
            )
        label = -1
        if LABEL_EXTENSION in members:
            label = parse_label(members[LABEL_EXTENSION], len(self.classes), lambda: where_of(self._set, key))
        if image.size != (self._side, self._side):
            image = adm_center_crop(image, self._side)
        return np.asarray(image), label


class Reference:
    """Images, or statistics, or both.

    images: None where there are statistics alone. statistics: by the name of the space, `inception` and
    `inception.spatial` for ADM's `mu, sigma` and `mu_s, sigma_s`, others for `mu@NAME, sigma@NAME`. identities: of the
    weights that statistics of the latter kind come from.

    Raises:
        UserError: at construction, for a file that is damaged or foreign, and for statistics that cannot be used:
            before the first sample is read.
    """

    def __init__(self, path: Path, side: int | None = None):
        self.path = path
        self.images: Images | None = None
        self.statistics: dict[str, Gaussian] = {}
        self.identities: dict[str, str] = {}
        self.kind = "folder of images"
        if (path / INDEX_NAME).exists():
            self.kind, self.images = "shard set", ShardImages(path, side)
        elif path.is_dir():
            self.images = ImageFiles(path)
        else:
            self._read_npz()

    def _read_npz(self) -> None:
        members = _checked_members(self.path)
        names = [*sum(ADM_NAMES.values(), ()), *(name for name in members if "@" in name)]
        found = _read_arrays(self.path, [name for name in names if name in members])
        self.identities = {
            name.removeprefix(_IDENTITY): str(found[name]) for name in found if name.startswith(_IDENTITY)
        }
        spaces = dict(ADM_NAMES)
        for name in found:
            if name.startswith("mu@"):
                space = name.removeprefix("mu@")
                spaces[space] = (name, f"sigma@{space}")
        for space, (mu, sigma) in spaces.items():
            if mu in found or sigma in found:
                self.statistics[space] = _gaussian(self.path, found, mu, sigma, _WIDTHS.get(space))
        if "arr_0" in members:
            self.images = ImageFiles(self.path)
        self.kind = "images" if not self.statistics else "images and statistics"
        if self.images is None:
            self.kind = "statistics alone"
            if not self.statistics:
                raise UserError(
                    f"{self.path}: neither images (arr_0, uint8, N H W 3) nor statistics (mu, sigma) among "
                    f"{', '.join(members) or 'nothing'}; a reference needs one of them"
                )

    def fingerprint(self) -> str:
        """Changes when the reference does: names, sizes and times of its files."""
        if not self.path.is_dir():
            files = [self.path]
        else:
            # In a shard set the index has the checksums of all shards.
            index = self.path / INDEX_NAME
            files = [index] if index.exists() else sorted(path for path in self.path.rglob("*") if path.is_file())
        facts = [(str(file.relative_to(self.path.parent)), file.stat()) for file in files]
        shape = "" if self.images is None else str(self.images.shape)
        return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in facts]) + shape


def _checked_members(path: Path) -> list[str]:
    """Names of the arrays. The whole file is read, so that damage is found now."""
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if sum(info.file_size for info in archive.infolist()) > _MOST_RATIO * path.stat().st_size + _SLACK:
                raise ValueError(f"its arrays would have more than {_MOST_RATIO} times the file's bytes")
            damaged = archive.testzip()
    except OSError as error:
        raise UserError(f"{path}: cannot read the reference: {why_unreadable(path, error)}") from error
    except Exception as error:  # damaged bytes raise almost anything: BadZipFile, zlib.error, ...
        raise UserError(_foreign(path, error)) from error
    if damaged is not None:
        raise UserError(f"{path}: {damaged} is damaged (its checksum differs); copy or download the file again")
    return [name.removesuffix(".npy") for name in names]


def _read_arrays(path: Path, names: list[str]) -> dict[str, NDArray[Any]]:
    try:
        with open(path, "rb") as file:
            return read_archive(file, names)
    except (OSError, ValueError) as error:  # arrays of objects, headers of other programs
        raise UserError(_foreign(path, error)) from error


def _foreign(path: Path, error: Exception) -> str:
    return f"{path}: damaged, or not an .npz of plain arrays ({error}); copy, download or make it again"


def _gaussian(path: Path, found: dict[str, NDArray[Any]], mu: str, sigma: str, width: int | None) -> Gaussian:
    """The statistics of one space. Raises UserError for those that cannot be used."""
    for name in (mu, sigma):
        if name not in found:
            other = sigma if name == mu else mu
            raise UserError(f"{path}: {other} is there, but {name} is missing; give both, or leave both out")
        if found[name].dtype.kind not in "fiu":
            raise UserError(f"{path}: {name} is of type {found[name].dtype}, expected floating-point numbers")
    size = width or found[mu].size
    for name, shape in ((mu, (size,)), (sigma, (size, size))):
        array = found[name]
        fault = None
        if array.shape != shape or not size:
            fault = f"has shape {array.shape}"
        elif not np.isfinite(array).all():
            fault = "has values that are not finite"
        elif float(np.abs(array).max()) > LARGEST**2:
            fault = f"has values beyond {LARGEST**2:g}"
        elif array.ndim == 2:
            fault = covariance_fault(array.astype(np.float64))
        if fault is not None:
            raise UserError(
                f"{path}: {name} {fault}; expected {mu} ({size},) and {sigma} ({size}, {size}). Leave both out, and "
                "they are computed from the images"
            )
    return Gaussian(found[mu].astype(np.float64), np.ascontiguousarray(found[sigma], np.float64))
