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
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mepa_ds.data.index import INDEX_NAME, MadeBy, Member, ShardEntry, ShardIndex, keys_digest, read_table
from mepa_ds.data.remote import RemoteShards, ShardCache
from mepa_ds.data.tar import LABEL_EXTENSION, DamagedError, SampleTable, few, label_number
from mepa_ds.data.writer import PLAN_NAME, read_npy_header

Indices = NDArray[np.int64]
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_MAX_OPEN_FILES = 512


class ShardSet:
    """The samples of a directory of shards, numbered 0 to len - 1 in the order of the shards.

    Pickles (without its open files) and survives a fork: reads carry their own offset. Threads may share it.

    Args:
        directory: with `index.json`, or with WebDataset tars that others made (their headers are stepped over);
            with `remote.json` too if the tars are to be fetched (mepa_ds.data.remote).
        what: name of the setting that gave the directory, for messages.

    Raises:
        UserError: no set there.
    """

    def __init__(self, directory: Path, what: str = "shards"):
        self.directory, self.what = directory, what
        self._tables: dict[int, SampleTable] = {}
        unfinished = (directory / PLAN_NAME).exists()  # ShardIndex.read then says so
        if not (directory / INDEX_NAME).exists() and not unfinished and any(directory.glob("*.tar")):
            self.index = self._scan()
        else:
            self.index = ShardIndex.read(directory, what)
        remote = RemoteShards.read(directory)
        self.window = None if remote is None else remote.window
        """Shards that are shuffled together, where they have to be fetched; None for local files."""
        self.cache = None if remote is None else ShardCache(remote, self.index.shards, what)
        self._max_open_files = _max_open_files() if remote is None else 2 * remote.window
        self._paths = [str(directory / shard.name) for shard in self.index.shards]
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
        return [Path(path) for path in self._paths]

    def _scan(self) -> ShardIndex:
        """An index of tars that came without one."""
        entries, members, ignored = [], dict[str, Member](), list[str]()
        paths = sorted(self.directory.glob("*.tar"))
        hint = "reading headers (merge_index.py scan keeps them)"
        for number, path in enumerate(tqdm(paths, hint, delay=5)):
            table = self._tables[number] = read_table(path)
            digest = keys_digest(table)
            size = path.stat().st_size
            entries.append(
                ShardEntry(name=path.name, num_samples=len(table), bytes=size, sha256="", keys_sha256=digest)
            )
            members.update({extension: Member() for extension in table.extensions})
            ignored += table.ignored
        if ignored:
            tqdm.write(
                f"{self.what}: {self.directory}: {len(ignored)} members that belong to no sample are left out "
                f"({few(ignored)})",
                file=sys.stderr,
            )
        return ShardIndex(kind="images", shards=tuple(entries), members=members, made_by=MadeBy(name="webdataset"))

    def locate(self, samples: Indices) -> tuple[list[int], list[int]]:
        """(shard, row within the shard) of each sample number."""
        shards = np.searchsorted(self._starts, samples, side="right") - 1
        return shards.tolist(), (samples - self._starts[shards]).tolist()

    def table(self, shard: int) -> SampleTable:
        """The keys and offsets of a shard, read when first asked for."""
        if shard not in self._tables:
            path = self._paths[shard]
            try:
                table = read_table(Path(path))
            except (OSError, DamagedError) as error:
                raise DamagedError(f"{self.what}: {error}") from error
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
        present = [column for column in range(len(table.extensions)) if table.sizes_NM[row, column] >= 0]
        return table.key(row), {table.extensions[column]: self._read_member(shard, row, column) for column in present}

    def read_arrays(self, samples: Indices, extension: str, out: NDArray[Any], views: Indices | None = None) -> None:
        """Reads the .npy members of B samples into `out` (B, *shape), which must have the stored dtype.

        Args:
            views: (B,) for members that hold several views (V, *shape): which one to read of each sample.

        Raises:
            DamagedError: a member is missing, cut short, or holds another dtype or shape.
        """
        member = self.index.members[extension]
        assert member.shape is not None, extension
        assert member.dtype == str(out.dtype), (member.dtype, out.dtype)
        assert out.shape[1:] == (member.shape if views is None else member.shape[1:]), (out.shape, member.shape)
        rows_out = out.reshape(len(out), -1).view(np.uint8)
        row_bytes = rows_out.shape[1]
        expected = self._npy_header(extension, member)
        num_views = 1 if views is None else member.shape[0]
        scratch = bytearray(len(expected))
        shards, rows = self.locate(samples)
        for number, (shard, row) in enumerate(zip(shards, rows, strict=True)):
            table = self.table(shard)
            column = self._column(table, extension, shard)
            offset, size = int(table.offsets_NM[row, column]), int(table.sizes_NM[row, column])
            view = 0 if views is None else int(views[number])
            if size == len(expected) + num_views * row_bytes:
                if view == 0:
                    self._read_into([scratch, rows_out[number]], len(expected) + row_bytes, shard, offset, row)
                else:
                    self._read_into([scratch], len(expected), shard, offset, row)
                    start = offset + len(expected) + view * row_bytes
                    self._read_into([rows_out[number]], row_bytes, shard, start, row)
                if scratch == expected:
                    continue
            data = self._read_other_npy(shard, row, column, member)
            rows_out[number] = data[view * row_bytes : (view + 1) * row_bytes]

    def read_labels(self, samples: Indices) -> Indices:
        """(B,) int64 labels, from the tables or, where they lack them, from the `cls` members.

        Raises:
            DamagedError: a label is missing, no number, or outside the set's classes.
        """
        num_classes, labels = len(self.index.classes), np.empty(len(samples), np.int64)
        for number, (shard, row) in enumerate(zip(*self.locate(samples), strict=True)):
            known = self.table(shard).labels_N
            if known is not None and (not num_classes or known[row] < num_classes):
                labels[number] = known[row]
                continue
            data = self._read_member(shard, row, self._column(self.table(shard), LABEL_EXTENSION, shard))
            labels[number] = parse_label(data, num_classes, lambda: self._where(shard, row))  # noqa: B023
        return labels

    def keys(self, samples: Indices) -> list[bytes]:
        """Keys of B samples, as stored."""
        return [bytes(self.table(shard).keys_N[row]) for shard, row in zip(*self.locate(samples), strict=True)]

    def _where(self, shard: int, row: int) -> str:
        return f"{self.what}: {self._paths[shard]}: sample {self.table(shard).key(row)!r}"

    def _column(self, table: SampleTable, extension: str, shard: int) -> int:
        try:
            return table.extensions.index(extension)
        except ValueError:
            path = self._paths[shard]
            raise DamagedError(f"{self.what}: {path}: has no members .{extension}; {_REMEDY}") from None

    def _npy_header(self, extension: str, member: Member) -> bytes:
        if extension not in self._npy_headers:
            buffer = io.BytesIO()
            fields = {"descr": np.dtype(member.dtype).str, "fortran_order": False, "shape": member.shape}
            np.lib.format.write_array_header_1_0(buffer, fields)
            self._npy_headers[extension] = buffer.getvalue()
        return self._npy_headers[extension]

    def _read_other_npy(self, shard: int, row: int, column: int, expected: Member) -> NDArray[np.uint8]:
        """The slow way, for .npy files whose header another writer laid out differently: all data bytes."""
        table = self.table(shard)
        data = self._read_member(shard, row, column)
        where = f"{self._where(shard, row)}: .{table.extensions[column]}"
        try:
            member, start = read_npy_header(data)
        except ValueError as error:
            raise DamagedError(f"{where} is no array: {error}; {_REMEDY}") from error
        num_bytes = int(np.prod(member.shape or (0,))) * np.dtype(member.dtype).itemsize
        if member != expected or len(data) - start != num_bytes:
            raise DamagedError(
                f"{where} holds {member.dtype} {member.shape}, expected {expected.dtype} {expected.shape}; {_REMEDY}"
            )
        return np.frombuffer(data, np.uint8, offset=start)

    def _read_member(self, shard: int, row: int, column: int) -> bytes:
        table = self.table(shard)
        data = bytearray(max(int(table.sizes_NM[row, column]), 0))
        if data:
            self._read_into([data], len(data), shard, int(table.offsets_NM[row, column]), row)
        return bytes(data)

    def _read_into(self, buffers: list[Any], size: int, shard: int, offset: int, row: int) -> None:
        try:
            file = self._files.get(shard) or self._open(shard)  # held while reading: another thread may drop it
            done = os.preadv(file.descriptor, buffers, offset)
        except OSError as error:
            raise DamagedError(f"{self._where(shard, row)}: cannot be read: {error.strerror}; {_REMEDY}") from error
        if done != size:
            raise DamagedError(f"{self._where(shard, row)}: the shard ends inside it; {_REMEDY}")

    def _open(self, shard: int) -> _OpenFile:
        path = self._paths[shard]
        file = _OpenFile(path if self.cache is None else str(self.cache.path(shard)))
        actual, expected = os.fstat(file.descriptor).st_size, self.index.shards[shard].bytes
        if actual != expected:
            raise DamagedError(f"{self.what}: {path}: has {actual} bytes, the index says {expected}; {_REMEDY}")
        self._files[shard] = file
        while len(self._files) > self._max_open_files:
            self._files.popitem(last=False)  # closed when the last thread that reads from it lets go
        return file


_REMEDY = "run data_tools/verify_shards.py on the set, and make it again if it is damaged"


class _OpenFile:
    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _max_open_files() -> int:
    """A quarter of what the system lets this process open, for each set."""
    return max(min(_MAX_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4), 8)


def parse_label(data: bytes, num_classes: int, where: Callable[[], str]) -> int:
    """The number in a `cls` member. `num_classes` 0: any number from 0 up."""
    label = label_number(data)
    if label is None:
        raise DamagedError(f"{where()}: its label {data[:20]!r} is no number; {_REMEDY}")
    if num_classes and label >= num_classes:
        raise DamagedError(f"{where()}: label {label} is out of range, the set has {num_classes} classes; {_REMEDY}")
    return label
