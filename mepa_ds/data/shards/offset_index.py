"""The offset index of a shard: where its samples lie, as stored beside it or found in its headers.

Legend: N samples of a shard, M member extensions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.samples import Kind, Samples, grouped, image_samples, split_member_name, visible_members
from mepa_ds.errors import DamagedError
from mepa_ds.safety.text import printable

_LABEL_DIGITS = 18
_MOST_EXTENSIONS = 32
"""Most extensions in one shard, since each is a column."""
_ANEW = "make the shard again, or a set of it by mepa data build webdataset"


@dataclass(frozen=True)
class OffsetIndex:
    """Where the samples of one shard lie."""

    keys_N: NDArray[np.bytes_]
    extensions: tuple[str, ...]
    offsets_NM: NDArray[np.int64]
    """Byte offset of each member's data in the tar."""
    sizes_NM: NDArray[np.int64]
    """Bytes of each member; -1 where a sample has no such member."""
    labels_N: NDArray[np.int64] | None = None
    """The numbers in the `cls` members, so that these need not be read again; None if they have not been read."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Members that belong to no sample; of shards that others made."""

    def __len__(self) -> int:
        return len(self.keys_N)

    def key(self, row: int) -> str:
        return bytes(self.keys_N[row]).decode()

    @classmethod
    def of(cls, samples: list[tuple[str, dict[str, tuple[int, int]]]]) -> OffsetIndex:
        """From (key, {extension: (offset, size)}) in order."""
        extensions = tuple(dict.fromkeys(extension for _, members in samples for extension in members))
        places = np.array(
            [[members.get(extension, (0, -1)) for extension in extensions] for _, members in samples], np.int64
        ).reshape(len(samples), len(extensions), 2)
        keys = np.array([key.encode() for key, _ in samples], dtype=np.bytes_)
        return cls(keys, extensions, places[..., 0].copy(), places[..., 1].copy())


def label_number(data: bytes) -> int | None:
    """The number in a `cls` member; None for anything else, and for what int64 does not hold."""
    text = data.strip()
    return int(text) if text.isdigit() and len(text) <= _LABEL_DIGITS else None


def scan_tar(path: Path, kind: Kind) -> OffsetIndex:
    """The offset index of a tar that has none stored: WebDataset shards that others made.

    Raises:
        DamagedError: as `image_samples`; or keys that are not UTF-8, or whose members do not lie side by side.
    """
    left_out = LeftOut()
    if kind == "images":
        samples = image_samples(path, left_out)
    else:
        members = visible_members(path, left_out)
        samples = grouped(members, split_member_name, path, bool)
        taken = {number for found in samples.values() for number, _ in found.values()}
        for number, member in enumerate(members):
            if number not in taken:
                left_out.add("names without an extension", member.name)
    _check_keys(path, samples)
    offset_index = OffsetIndex.of(
        [(key, {ext: (m.offset, m.size) for ext, (_, m) in found.items()}) for key, found in samples.items()]
    )
    return replace(offset_index, left_out=left_out)


def _check_keys(path: Path, samples: Samples) -> None:
    for key in samples:
        if (shown := printable(key)) != key:
            raise DamagedError(f"{path}: the name of sample {shown!r} is not UTF-8; {_ANEW}")
    numbered = sorted((number, key) for key, found in samples.items() for number, _ in found.values())
    seen = set[str]()
    for key, _ in itertools.groupby(key for _, key in numbered):
        if key in seen:
            raise DamagedError(f"{path}: the members of sample {key!r} do not lie side by side; {_ANEW}")
        seen.add(key)
    extensions = {extension for found in samples.values() for extension in found}
    if len(extensions) > _MOST_EXTENSIONS:
        raise DamagedError(
            f"{path}: has members of {len(extensions)} kinds ({', '.join(sorted(extensions)[:3])}, ...): a key ends at "
            "the first dot of the file name; make the shard again, with names that have one dot"
        )
