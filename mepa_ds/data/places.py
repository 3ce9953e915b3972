"""Where the samples of a set lie: the offset indices of its shards as arrays over all its samples.

Legend: N samples of the set, n of a shard, B of a batch, M member extensions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mepa_ds.data.order import Indices
from mepa_ds.data.shards.index import FOREIGN, ShardIndex, keys_digest, read_offset_index
from mepa_ds.data.shards.offset_index import OffsetIndex, check_within
from mepa_ds.errors import DamagedError, UserError

REMEDY = "run mepa data verify on the set, and make it again if it is damaged"
RESCAN = "if it was replaced, run mepa data scan on the set again"


def remedy(index: ShardIndex) -> str:
    """What a message advises when a shard is not the one that its index describes."""
    return RESCAN if index.made_by == FOREIGN else REMEDY


class Places:
    """Keys, labels and members' places of a set. A shard's offset index is read when a sample of it is first asked for.

    A pickled copy has no offset indices. Threads may share an instance: two that read the same offset index write the
    same values.
    """

    def __init__(self, index: ShardIndex, paths: list[str], what: str):
        self.extensions = tuple(index.members)
        self._index, self._paths, self._what = index, paths, what
        self._array_bytes = {extension: member.num_bytes for extension, member in index.members.items()}
        self._starts = np.cumsum([0] + [shard.num_samples for shard in index.shards], dtype=np.int64)
        self._forget()

    def _forget(self) -> None:
        size, num_shards = int(self._starts[-1]), len(self._paths)
        try:
            # Offset and size side by side: one access to memory for a sample. Pages are taken as they are written.
            self._places_NM2 = np.empty((size, len(self.extensions), 2), np.int64)
            self._labels_N = np.empty(size, np.int64)
        except MemoryError:
            raise UserError(
                f"{self._what}: {size} samples with {len(self.extensions)} members each: their offsets do not fit in "
                "this machine's memory; split the set, or give the job more memory"
            ) from None
        self._keys: list[NDArray[np.bytes_] | None] = [None] * num_shards
        self._is_read = np.zeros(num_shards, np.bool_)

    def __getstate__(self) -> dict[str, Any]:
        read_later = ("_places_NM2", "_labels_N", "_keys", "_is_read")
        return {name: value for name, value in self.__dict__.items() if name not in read_later}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def shards_of(self, samples_B: Indices) -> Indices:
        """(B,) the shard of each sample, whose offset index is then at hand.

        Raises:
            DamagedError: a offset index cannot be read, or does not fit the index.
        """
        shards_B = np.searchsorted(self._starts, samples_B, side="right") - 1
        known_B = self._is_read[shards_B]
        if not known_B.all():
            for shard in np.unique(shards_B[~known_B]).tolist():
                self._read(shard)
        return shards_B

    def look_up(self, samples_B: Indices) -> None:
        """`shards_of`, if there is a shard left whose offset index is not at hand."""
        if not self._is_read.all():
            self.shards_of(samples_B)

    def members(self, samples_B: Indices) -> tuple[Indices, Indices, Indices]:
        """(B,) shards and (B, M) offsets and sizes of members, of `extensions` in order; size -1: no such member."""
        shards_B = self.shards_of(samples_B)
        places_BM2 = self._places_NM2[samples_B]
        return shards_B, places_BM2[..., 0], places_BM2[..., 1]

    def labels(self, samples_B: Indices) -> Indices:
        """(B,) labels that the offset indices hold; -1 where they do not."""
        self.shards_of(samples_B)
        return self._labels_N[samples_B]

    def keys(self, samples_B: Indices) -> list[bytes]:
        """Keys as stored."""
        shards_B = self.shards_of(samples_B)
        rows_B = samples_B - self._starts[shards_B]
        return [self._key(shard, row) for shard, row in zip(shards_B.tolist(), rows_B.tolist(), strict=True)]

    def _key(self, shard: int, row: int) -> bytes:
        keys_N = self._keys[shard]
        assert keys_N is not None
        return bytes(keys_N[row])

    def _read(self, shard: int) -> None:
        path, entry = self._paths[shard], self._index.shards[shard]
        try:
            offset_index = read_offset_index(Path(path), self._index.kind, self._index.made_by == FOREIGN)
        except (OSError, DamagedError) as error:
            raise DamagedError(f"{self._what}: {error}") from error
        if len(offset_index) != entry.num_samples:
            raise DamagedError(
                f"{self._what}: {path}: has {len(offset_index)} samples, the index says {entry.num_samples}; "
                f"{remedy(self._index)}"
            )
        try:
            check_within(offset_index, entry.bytes, self._array_bytes)
        except ValueError as error:
            raise DamagedError(f"{self._what}: {path}: its offsets are wrong: {error}; {remedy(self._index)}") from None
        # With this, sets whose indices have equal keys need not be compared again, batch by batch.
        if keys_digest(offset_index) != entry.keys_sha256:
            raise DamagedError(f"{self._what}: {path}: its keys are not those of the index; {remedy(self._index)}")
        self.add(shard, offset_index)

    def add(self, shard: int, offset_index: OffsetIndex) -> None:
        """Takes a shard's offset index over."""
        rows = slice(*self._starts[shard : shard + 2])
        # Made aside and put in at once: another thread may have read this index too, and use its places.
        places_nM2 = np.empty((len(offset_index), len(self.extensions), 2), np.int64)
        places_nM2[:] = (0, -1)
        for column, extension in enumerate(self.extensions):
            if extension in offset_index.extensions:
                theirs = offset_index.extensions.index(extension)
                places_nM2[:, column, 0] = offset_index.offsets_NM[:, theirs]
                places_nM2[:, column, 1] = offset_index.sizes_NM[:, theirs]
        self._places_NM2[rows] = places_nM2
        self._labels_N[rows] = -1 if offset_index.labels_N is None else offset_index.labels_N
        self._keys[shard] = offset_index.keys_N
        self._is_read[shard] = True
