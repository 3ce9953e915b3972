"""A shard set opened for reading: any sample by number, members by offset, files opened as needed.

Members are read with `pread` straight into their place in the batch. Reading through a memory map is about a sixth
faster from the page cache, but a file that shrinks or a disk that fails then kills the process with SIGBUS, and a
slow disk stops every thread of it; `pread` raises an error that names the file and lets other threads run.

Legend: B batch, M member extensions.
"""

from __future__ import annotations

import io
import os
import resource
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mepa_ds.data.index import INDEX_NAME, MadeBy, Member, ShardEntry, ShardIndex, keys_digest, read_table
from mepa_ds.data.tar import DamagedError, SampleTable
from mepa_ds.data.writer import read_npy_header
from mepa_ds.errors import UserError

Indices = NDArray[np.int64]
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSION = "cls"
_MAX_OPEN_FILES = 512


class ShardSet:
    """The samples of a directory of shards, numbered 0 to len - 1 in the order of the shards.

    Pickles (without its open files) and survives a fork: reads carry their own offset. Threads may share it.

    Args:
        directory: with `index.json`, or with WebDataset tars that others made (their headers are stepped over).
        what: name of the setting that gave the directory, for messages.

    Raises:
        UserError: no set there.
    """

    def __init__(self, directory: Path, what: str = "shards"):
        self.directory, self.what = directory, what
        self._tables: dict[int, SampleTable] = {}
        if not (directory / INDEX_NAME).exists() and any(directory.glob("*.tar")):
            self.index = self._scan()
        else:
            self.index = ShardIndex.read(directory, what)
        self._starts = np.cumsum([0] + [shard.num_samples for shard in self.index.shards], dtype=np.int64)
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._npy_headers: dict[str, bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_tables": {}}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return tuple(shard.num_samples for shard in self.index.shards)

    @property
    def shard_paths(self) -> list[Path]:
        return [self.directory / shard.name for shard in self.index.shards]

    def _scan(self) -> ShardIndex:
        """An index of tars that came without one."""
        entries, members = [], dict[str, Member]()
        for number, path in enumerate(sorted(self.directory.glob("*.tar"))):
            table = self._tables[number] = read_table(path)
            digest = keys_digest(table)
            size = path.stat().st_size
            entries.append(
                ShardEntry(name=path.name, num_samples=len(table), bytes=size, sha256="", keys_sha256=digest)
            )
            members.update({extension: Member() for extension in table.extensions})
        return ShardIndex(kind="images", shards=tuple(entries), members=members, made_by=MadeBy(name="webdataset"))

    def locate(self, samples: Indices) -> tuple[list[int], list[int]]:
        """(shard, row within the shard) of each sample number."""
        shards = np.searchsorted(self._starts, samples, side="right") - 1
        return shards.tolist(), (samples - self._starts[shards]).tolist()

    def table(self, shard: int) -> SampleTable:
        """The keys and offsets of a shard, read when first asked for."""
        if shard not in self._tables:
            path = self.directory / self.index.shards[shard].name
            try:
                table = read_table(path)
            except (OSError, ValueError, KeyError) as error:
                raise DamagedError(f"{self.what}: {path}: its offsets cannot be read: {error}; {_REMEDY}") from error
            if len(table) != self.index.shards[shard].num_samples:
                raise DamagedError(
                    f"{self.what}: {path}: has {len(table)} samples, the index says "
                    f"{self.index.shards[shard].num_samples}; {_REMEDY}"
                )
            self._tables[shard] = table
        return self._tables[shard]

    def key(self, sample: int) -> str:
        shards, rows = self.locate(np.array([sample]))
        return self.table(shards[0]).key(rows[0])

    def read(self, sample: int) -> tuple[str, dict[str, bytes]]:
        """Key and members of one sample.

        Raises:
            DamagedError: the shard is missing, cut short or changed.
        """
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        (shard,), (row,) = self.locate(np.array([sample]))
        table = self.table(shard)
        members = {}
        for column, extension in enumerate(table.extensions):
            size = int(table.sizes_NM[row, column])
            if size >= 0:
                members[extension] = data = bytearray(size)
                self._read_into([data], shard, int(table.offsets_NM[row, column]), size, table.key(row))
        return table.key(row), {extension: bytes(data) for extension, data in members.items()}

    def read_arrays(self, samples: Indices, extension: str, out: NDArray[Any]) -> None:
        """Reads the .npy members of B samples into `out` (B, *shape), which must have the stored dtype.

        Raises:
            DamagedError: a member is missing, cut short, or holds another dtype or shape.
        """
        rows_out = out.reshape(len(out), -1).view(np.uint8)
        expected = self._npy_header(extension, str(out.dtype), out.shape[1:])
        size_expected = len(expected) + rows_out.shape[1]
        scratch = bytearray(len(expected))
        shards, rows = self.locate(samples)
        for row_out, shard, row in zip(rows_out, shards, rows, strict=True):
            table = self.table(shard)
            column = self._column(table, extension, shard)
            offset, size = int(table.offsets_NM[row, column]), int(table.sizes_NM[row, column])
            if size == size_expected:
                self._read_into([scratch, row_out], shard, offset, size, table.key(row))
                if scratch == expected:
                    continue
            self._read_other_npy(row_out, out, shard, row, column)

    def read_labels(self, samples: Indices) -> Indices:
        """(B,) int64 labels: the `cls` members, in ASCII.

        Raises:
            DamagedError: a label is missing, no number, or outside the set's classes.
        """
        labels = np.empty(len(samples), np.int64)
        for number, (shard, row) in enumerate(zip(*self.locate(samples), strict=True)):
            table = self.table(shard)
            column = self._column(table, LABEL_EXTENSION, shard)
            data = bytearray(max(int(table.sizes_NM[row, column]), 0))
            self._read_into([data], shard, int(table.offsets_NM[row, column]), len(data), table.key(row))
            labels[number] = parse_label(bytes(data), len(self.index.classes), self._where(shard, row))
        return labels

    def keys(self, samples: Indices) -> list[bytes]:
        """Keys of B samples, as stored."""
        return [bytes(self.table(shard).keys_N[row]) for shard, row in zip(*self.locate(samples), strict=True)]

    def _where(self, shard: int, row: int) -> str:
        return f"{self.what}: {self.directory / self.index.shards[shard].name}: sample {self.table(shard).key(row)!r}"

    def _column(self, table: SampleTable, extension: str, shard: int) -> int:
        try:
            return table.extensions.index(extension)
        except ValueError:
            path = self.directory / self.index.shards[shard].name
            raise DamagedError(f"{self.what}: {path}: has no members .{extension}; {_REMEDY}") from None

    def _npy_header(self, extension: str, dtype: str, shape: tuple[int, ...]) -> bytes:
        if extension not in self._npy_headers:
            buffer = io.BytesIO()
            descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
            np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
            self._npy_headers[extension] = buffer.getvalue()
        return self._npy_headers[extension]

    def _read_other_npy(self, row_out: NDArray[np.uint8], out: NDArray[Any], shard: int, row: int, column: int) -> None:
        """The slow way, for .npy files whose header another writer laid out differently."""
        table = self.table(shard)
        extension = table.extensions[column]
        data = bytearray(max(int(table.sizes_NM[row, column]), 0))
        self._read_into([data], shard, int(table.offsets_NM[row, column]), len(data), table.key(row))
        try:
            member, start = read_npy_header(bytes(data[:4096]))
        except ValueError as error:
            raise DamagedError(f"{self._where(shard, row)}: .{extension} is no array: {error}; {_REMEDY}") from error
        if np.dtype(member.dtype) != out.dtype or member.shape != out.shape[1:] or len(data) - start != len(row_out):
            raise DamagedError(
                f"{self._where(shard, row)}: .{extension} holds {member.dtype} {member.shape}, expected "
                f"{out.dtype} {out.shape[1:]}; {_REMEDY}"
            )
        row_out[:] = np.frombuffer(data, np.uint8, offset=start)

    def _read_into(self, buffers: list[Any], shard: int, offset: int, size: int, key: str) -> None:
        if size == 0:
            return
        path = self.directory / self.index.shards[shard].name
        try:
            done = os.preadv(self._descriptor(shard, path), buffers, offset)
        except OSError as error:
            raise DamagedError(
                f"{self.what}: {path}: cannot be read at sample {key!r}: {error.strerror}; {_REMEDY}"
            ) from error
        if done != size:
            raise DamagedError(f"{self.what}: {path}: ends inside sample {key!r}; {_REMEDY}")

    def _descriptor(self, shard: int, path: Path) -> int:
        file = self._files.get(shard)
        if file is None:
            file = _OpenFile(path)
            actual, expected = os.fstat(file.descriptor).st_size, self.index.shards[shard].bytes
            if actual != expected:
                raise DamagedError(f"{self.what}: {path}: has {actual} bytes, the index says {expected}; {_REMEDY}")
            self._files[shard] = file
            while len(self._files) > _max_open_files():
                self._files.popitem(last=False)  # closed when the last thread that reads from it lets go
        return file.descriptor


_REMEDY = "run data_tools/verify_shards.py on the set, and make it again if it is damaged"


class _OpenFile:
    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _max_open_files() -> int:
    """A quarter of what the system lets this process open, for each set."""
    return max(min(_MAX_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4), 8)


def parse_label(data: bytes, num_classes: int, where: str) -> int:
    """The number in a `cls` member. `num_classes` 0: any number from 0 up."""
    text = data.strip()
    if not text.isdigit():
        raise DamagedError(f"{where}: its label {data[:20]!r} is no number; {_REMEDY}")
    label = int(text)
    if num_classes and label >= num_classes:
        raise DamagedError(f"{where}: label {label} is out of range, the set has {num_classes} classes; {_REMEDY}")
    return label
