"""A shard set opened for reading: any sample by number, members by offset, files opened as needed.

Members are read with `preadv` straight into their place in the batch. Reading through a memory map is about a sixth
faster from the page cache, but a file that shrinks or a disk that fails then kills the process with SIGBUS, and a
slow disk stops every thread of it; `preadv` raises an error that names the file and lets other threads run.

Legend: B samples of a batch, M member extensions, H bytes of an .npy header, R bytes of one array.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mepa_ds.data.order import Indices
from mepa_ds.data.places import REMEDY, RESCAN, Places, remedy
from mepa_ds.data.remote.remote_file import REMOTE_NAME, RemoteShards
from mepa_ds.data.remote.schemes import check_from_data
from mepa_ds.data.remote.shard_cache import ShardCache
from mepa_ds.data.shards.index import (
    FOREIGN,
    INDEX_NAME,
    MANY_SAMPLES,
    Member,
    ShardEntry,
    ShardIndex,
    is_plain,
    keys_digest,
    offset_index_path,
    read_offset_index,
    why_not_plain,
)
from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.offset_index import OffsetIndex, check_within, label_number
from mepa_ds.data.shards.open_files import OpenFile, OpenFiles
from mepa_ds.data.shards.samples import LABEL_EXTENSION, most_bytes, tar_files
from mepa_ds.data.shards.tar_headers import BLOCK
from mepa_ds.data.shards.writer import MANIFEST_NAME, read_npy_header
from mepa_ds.errors import DamagedError, UserError
from mepa_ds.files import again
from mepa_ds.progress import Progress


class ShardSet:
    """The samples of a directory of shards, numbered 0 to len - 1 in the order of the shards.

    It pickles (without its open files) and survives a fork, since reads carry their own offset. Threads may share it.

    Args:
        directory: with `index.json`, or with WebDataset tars that others made (their headers are stepped over);
            with `remote.json` too if the tars are to be fetched (mepa_ds.data.remote.remote_file).
        what: name of the recipe key or option that gave the directory, for messages.

    Raises:
        UserError: no set there.
    """

    def __init__(self, directory: Path, what: str = "shards"):
        self.directory, self.what = directory, what
        unfinished = (directory / MANIFEST_NAME).exists()  # ShardIndex.read then says so
        offset_indices = list[OffsetIndex]()
        indexed = (directory / INDEX_NAME).exists() or unfinished or not directory.is_dir()
        if not indexed and tar_files(directory):
            self.index, offset_indices = self._scan()
        else:
            self.index = ShardIndex.read(directory, what)
        remote = RemoteShards.read(directory)
        if remote is not None:
            check_from_data(remote.urls, f"{what}: {directory / REMOTE_NAME}")
        self.window = None if remote is None else remote.window
        """Shards that are shuffled together, where they have to be fetched; None for local files."""
        self.cache = None if remote is None else ShardCache(remote, self.index.shards, what)
        self._paths = [str(directory / shard.name) for shard in self.index.shards]
        if self.index.num_samples > MANY_SAMPLES:
            self._check_many()
        self._places = Places(self.index, self._paths, what)
        for shard, offset_index in enumerate(offset_indices):
            self._places.add(shard, offset_index)
        # An open file still takes disk space after the cache has removed its name.
        self._files = OpenFiles(None if remote is None else 2 * remote.window)
        self._npy_headers: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._places)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return tuple(shard.num_samples for shard in self.index.shards)

    @property
    def shard_paths(self) -> list[Path]:
        return [Path(path) for path in self._paths]

    def _check_many(self) -> None:
        """Raises UserError unless a set that says it has very many samples has files of that size."""
        for path, shard in zip(self.shard_paths, self.index.shards, strict=True):
            file, least = (path, BLOCK) if self.cache is None else (offset_index_path(path), 1)
            size = file.stat().st_size if file.is_file() else 0
            if shard.num_samples * least > size:
                raise UserError(
                    f"{self.what}: {file} has {size} bytes, too few for the {shard.num_samples} samples that the index "
                    f"says; {remedy(self.index)}"
                )

    def _scan(self) -> tuple[ShardIndex, list[OffsetIndex]]:
        """An index of tars that came without one, and their offset indices."""
        left_out = LeftOut()
        paths = tar_files(self.directory, left_out)
        progress = Progress(paths, "reading headers (mepa data scan keeps them)", delay=5)
        offset_indices = [self._scan_shard(path) for path in progress]
        for offset_index in offset_indices:
            left_out.update(offset_index.left_out)
        if left_out:
            Progress.write(f"{self.what}: {self.directory}: {left_out}", file=sys.stderr)
        entries = [
            ShardEntry(
                name=path.name,
                num_samples=len(offset_index),
                bytes=path.stat().st_size,
                sha256="",
                keys_sha256=keys_digest(offset_index),
            )
            for path, offset_index in zip(paths, offset_indices, strict=True)
        ]
        members = {extension: Member() for offset_index in offset_indices for extension in offset_index.extensions}
        try:
            return ShardIndex(kind="images", shards=tuple(entries), members=members, made_by=FOREIGN), offset_indices
        except ValueError as error:
            raise UserError(f"{self.what}: {self.directory}: {error}") from None

    def _scan_shard(self, path: Path) -> OffsetIndex:
        if not is_plain(path.name):
            raise UserError(f"{self.what}: {self.directory}: {why_not_plain(path.name)}")
        offset_index = read_offset_index(path, "images", foreign=True)
        try:
            check_within(offset_index, path.stat().st_size, {})
        except ValueError as error:
            raise DamagedError(f"{self.what}: {path}: its offsets are wrong: {error}; {RESCAN}") from None
        return offset_index

    def key(self, sample: int) -> str:
        return self.keys(np.array([sample]))[0].decode()

    def keys(self, samples_B: Indices) -> list[bytes]:
        """Keys of B samples, as stored."""
        return self._places.keys(samples_B)

    def look_up(self, samples_B: Indices) -> None:
        """Reads the offset indices of the samples' shards, if they are not at hand, and checks them against the index.

        Raises:
            DamagedError: an offset index cannot be read, or is not of what the index describes.
        """
        self._places.look_up(samples_B)

    def read(self, sample: int) -> tuple[str, dict[str, bytes]]:
        """Key and members of one sample.

        Raises:
            DamagedError: the shard is missing, cut short or changed.
        """
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        _, _, (sizes_M,) = self._places.members(np.array([sample]))
        extensions = zip(self._places.extensions, sizes_M.tolist(), strict=True)
        return self.key(sample), {ext: self._read_member(sample, ext) for ext, size in extensions if size >= 0}

    def read_arrays(
        self, samples_B: Indices, extension: str, out: NDArray[Any], views_B: Indices | None = None
    ) -> None:
        """Reads the .npy members of B samples into `out` (B, *shape), which must have the stored dtype.

        Args:
            views_B: for members that hold several views (V, *shape): which one to read of each sample.

        Raises:
            DamagedError: a member is missing, cut short, or holds another dtype or shape.
        """
        member = self.index.members[extension]
        assert member.shape is not None, extension
        assert member.dtype == str(out.dtype), (member.dtype, out.dtype)
        assert out.shape[1:] == (member.shape if views_B is None else member.shape[1:]), (out.shape, member.shape)
        arrays_BR = out.reshape(len(out), -1).view(np.uint8)
        num_bytes = arrays_BR.shape[1]
        header = self._npy_header(extension, member)
        headers_BH = np.empty((len(out), len(header)), np.uint8)
        shards_B, offsets_B, sizes_B = self._member_places(samples_B, extension)
        starts_B = np.zeros_like(samples_B) if views_B is None else views_B * num_bytes
        expected_size = len(header) + num_bytes * (1 if views_B is None else member.shape[0])
        as_expected_B = sizes_B == expected_size
        columns = (column.tolist() for column in (samples_B, shards_B, offsets_B, starts_B))
        reads = zip(headers_BH, arrays_BR, *columns, strict=True)
        for header_H, array_R, sample, shard, offset, start in compress(reads, as_expected_B.tolist()):
            if start == 0:
                self._read_into([header_H, array_R], len(header) + num_bytes, sample, shard, offset)
            else:
                self._read_into([header_H], len(header), sample, shard, offset)
                self._read_into([array_R], num_bytes, sample, shard, offset + len(header) + start)
        as_expected_B &= (headers_BH == np.frombuffer(header, np.uint8)).all(axis=1)
        for number in np.flatnonzero(~as_expected_B).tolist():
            data = self._read_other_npy(int(samples_B[number]), extension, member)
            arrays_BR[number] = data[starts_B[number] : starts_B[number] + num_bytes]

    def read_labels(self, samples_B: Indices) -> Indices:
        """(B,) int64 labels, from the offset indices or, where they lack them, from the `cls` members.

        Raises:
            DamagedError: a label is missing, no number, or outside the set's classes.
        """
        num_classes, labels_B = len(self.index.classes), self._places.labels(samples_B)
        unknown_B = (labels_B < 0) | (labels_B >= num_classes if num_classes else False)
        for number in np.flatnonzero(unknown_B).tolist():
            sample = int(samples_B[number])
            data = self._read_member(sample, LABEL_EXTENSION)
            labels_B[number] = parse_label(data, num_classes, lambda: self._where(sample))  # noqa: B023
        return labels_B

    def _where(self, sample: int) -> str:
        shard = int(self._places.shards_of(np.array([sample]))[0])
        return f"{self.what}: {self._paths[shard]}: sample {self.key(sample)!r}"

    def _member_places(self, samples_B: Indices, extension: str) -> tuple[Indices, Indices, Indices]:
        """(B,) shard, offset and size of one member of each sample."""
        shards_B, offsets_BM, sizes_BM = self._places.members(samples_B)
        column = self._places.extensions.index(extension) if extension in self._places.extensions else None
        if column is None or (sizes_BM[:, column] < 0).any():
            lacking = 0 if column is None else int((sizes_BM[:, column] < 0).argmax())
            raise DamagedError(f"{self._where(int(samples_B[lacking]))}: has no member .{extension}; {REMEDY}")
        return shards_B, offsets_BM[:, column], sizes_BM[:, column]

    def _npy_header(self, extension: str, member: Member) -> bytes:
        if extension not in self._npy_headers:
            buffer = io.BytesIO()
            fields = {"descr": np.dtype(member.dtype).str, "fortran_order": False, "shape": member.shape}
            np.lib.format.write_array_header_1_0(buffer, fields)
            self._npy_headers[extension] = buffer.getvalue()
        return self._npy_headers[extension]

    def _read_other_npy(self, sample: int, extension: str, expected: Member) -> NDArray[np.uint8]:
        """The slow way, for .npy files whose header another writer laid out differently: all data bytes."""
        data = self._read_member(sample, extension)
        where = f"{self._where(sample)}: .{extension}"
        try:
            member, start = read_npy_header(data)
        except ValueError as error:
            raise DamagedError(f"{where} is no array: {error}; {REMEDY}") from error
        if member != expected or len(data) - start != member.num_bytes:
            raise DamagedError(
                f"{where} holds {member.dtype} {member.shape}, expected {expected.dtype} {expected.shape}; {REMEDY}"
            )
        return np.frombuffer(data, np.uint8, offset=start)

    def _read_member(self, sample: int, extension: str) -> bytes:
        (shard,), (offset,), (size,) = (
            column.tolist() for column in self._member_places(np.array([sample]), extension)
        )
        if size > (most := most_bytes(extension)):
            raise DamagedError(
                f"{self._where(sample)}: .{extension} has {size} bytes; at most {most} are read; {REMEDY}"
            )
        data = bytearray(size)
        self._read_into([data], size, sample, shard, offset)
        return bytes(data)

    def _read_into(self, buffers: list[Any], size: int, sample: int, shard: int, offset: int) -> None:
        try:
            done = again(lambda: self._read_once(buffers, shard, offset))
        except OSError as error:
            raise DamagedError(f"{self._where(sample)}: cannot be read: {error.strerror}; {REMEDY}") from error
        if done != size:
            raise DamagedError(f"{self._where(sample)}: the shard ends inside it; {REMEDY}")

    def _read_once(self, buffers: list[Any], shard: int, offset: int) -> int:
        file = self._files.get(shard) or self._open(shard)  # held while reading: another thread may drop it
        try:
            return os.preadv(file.descriptor, buffers, offset)
        except OSError:
            self._files.drop(shard)  # the next try opens it anew
            raise

    def _open(self, shard: int) -> OpenFile:
        path = self._paths[shard]
        file = OpenFile(path) if self.cache is None else self.cache.open(shard)
        actual, expected = os.fstat(file.descriptor).st_size, self.index.shards[shard].bytes
        if actual != expected:
            raise DamagedError(
                f"{self.what}: {path}: has {actual} bytes, the index says {expected}; {remedy(self.index)}"
            )
        self._files.add(shard, file)
        return file


def parse_label(data: bytes, num_classes: int, where: Callable[[], str]) -> int:
    """The number in a `cls` member. `num_classes` 0: any number from 0 up."""
    label = label_number(data)
    if label is None:
        raise DamagedError(f"{where()}: its label {data[:20]!r} is no number; {REMEDY}")
    if num_classes and label >= num_classes:
        raise DamagedError(f"{where()}: label {label} is out of range, the set has {num_classes} classes; {REMEDY}")
    return label


def spread(size: int, count: int) -> list[int]:
    """At most `count` different sample numbers, evenly over a set of `size`."""
    return np.linspace(0, size - 1, min(size, count)).round().astype(int).tolist()
