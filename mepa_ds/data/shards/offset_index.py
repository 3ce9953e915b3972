"""The offset index of a shard: where its samples lie, as stored beside it or found in its headers.

Legend: N samples of a shard, M member extensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.samples import Kind, Samples, grouped, image_samples, split_member_name, visible_members
from mepa_ds.errors import DamagedError
from mepa_ds.safety.text import printable, printable_lines

_LABEL_DIGITS = 18
MOST_EXTENSIONS = 32
"""Most extensions in one shard, since each is a column."""
_MOST_KEY_BYTES = 1 << 28
"""Keys of a shard are stored as wide as the longest, which one long name among many short ones would abuse."""
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


def check_offset_index(found: OffsetIndex) -> None:
    """Checks what a file gave. Raises ValueError unless the arrays belong together and may be places in a tar."""
    keys_N, shape = found.keys_N, (len(found.keys_N) if found.keys_N.ndim else 0, len(found.extensions))
    if keys_N.ndim != 1 or keys_N.dtype.kind not in "Sf" or (len(keys_N) and keys_N.dtype.kind != "S"):
        raise ValueError("its keys are no list of names")
    for name, values in (("offsets", found.offsets_NM), ("sizes", found.sizes_NM)):
        if values.dtype != np.int64 or values.shape != shape:
            raise ValueError(f"its {name} are {values.dtype} {values.shape}, expected int64 {shape}")
    if found.labels_N is not None and found.labels_N.dtype != np.int64:
        raise ValueError(f"its labels are {found.labels_N.dtype}, expected int64")
    if len(set(found.extensions)) < len(found.extensions):
        raise ValueError("an extension comes twice")
    if found.offsets_NM.min(initial=0) < 0 or found.sizes_NM.min(initial=0) < -1:
        raise ValueError("an offset or a size is negative")
    text = b"\n".join(keys_N.tolist()).decode(errors="surrogateescape")
    if printable_lines(text) != text or "\t" in text or text.count("\n") != max(len(keys_N) - 1, 0):
        raise ValueError("a key is not UTF-8, or has control characters")


def check_within(found: OffsetIndex, num_bytes: int, arrays: Mapping[str, int]) -> None:
    """Checks an offset index against its shard.

    Args:
        num_bytes: of the shard.
        arrays: bytes of the array in each .npy member by extension. These lie side by side, each in its own place, so
            that batches are no larger than what is read for them.

    Raises:
        ValueError: a member would end behind the shard, or is too small for its array.
    """
    offsets_NM, sizes_NM = found.offsets_NM, found.sizes_NM
    if (sizes_NM > num_bytes).any() or (offsets_NM > num_bytes - np.maximum(sizes_NM, 0)).any():
        raise ValueError(f"a member lies beyond the {num_bytes} bytes of the shard")
    for column, extension in enumerate(found.extensions):
        if not (least := arrays.get(extension, 0)):
            continue
        sizes_N = sizes_NM[:, column]
        if ((sizes_N >= 0) & (sizes_N < least)).any():
            raise ValueError(f"a member .{extension} has less than the {least} bytes of its array")
        if float(np.maximum(sizes_N, 0).sum(dtype=np.float64)) > num_bytes:
            raise ValueError(f"the members .{extension} have more bytes than the shard")


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
    if len(samples) * max((len(key.encode()) for key in samples), default=0) > _MOST_KEY_BYTES:
        raise DamagedError(f"{path}: the longest of its {len(samples)} keys is too long; {_ANEW}, with shorter names")
    extensions = {extension for found in samples.values() for extension in found}
    if len(extensions) > MOST_EXTENSIONS:
        raise DamagedError(
            f"{path}: has members of {len(extensions)} kinds ({', '.join(sorted(extensions)[:3])}, ...): a key ends at "
            "the first dot of the file name; make the shard again, with names that have one dot"
        )
