"""A shard set's `index.json`: what is in the set, how much, and what made it; and the offsets beside each shard.

A set is a directory of WebDataset tars `shard-000000.tar`, an offset index `shard-000000.idx.npz` beside each, and
one `index.json`. Tokens and features are sets of their own with the same keys in the same order as the images
they come from, shard by shard: their `keys_sha256` are equal.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, ConfigDict, Field, model_validator
from typing_extensions import Self

from mepa_ds.config.base import Section, validate
from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.offset_index import MOST_EXTENSIONS, OffsetIndex, check_offset_index, scan_tar
from mepa_ds.data.shards.samples import Kind
from mepa_ds.data.shards.tar_headers import BLOCK
from mepa_ds.errors import DamagedError, UserError
from mepa_ds.files import atomic_path, naming_full_disks, read_file, write_json
from mepa_ds.safety.reading import parse_json, read_archive, read_json_object
from mepa_ds.safety.text import printable, printable_json

INDEX_NAME = "index.json"
DType = Literal[
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"
]
"""Types of .npy members."""
MOST_OFFSET_BYTES = 1 << 28
"""Largest size of an offset index, unpacked: three million samples of a shard, with keys of forty letters."""
MOST_NAME = 150
"""Longest name of a shard: the 255 bytes of file systems less what offset indices and temporary files add to it."""
MANY_SAMPLES = 10_000_000
"""An index that says more is looked at more closely before memory is taken for it."""
_MOST_SHARD_BYTES = 1 << 44
_MOST_SAMPLES = 1 << 32
_MOST_MEMBER_BYTES = 1 << 30
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
_EXTENSION = re.compile(r"[a-z0-9_][a-z0-9_.+-]{0,63}", re.ASCII)


def is_plain(name: str) -> bool:
    """Whether a shard may be called so: such a name is a word to every shell, address and file system."""
    return len(name) <= MOST_NAME and _PLAIN.fullmatch(name) is not None


def why_not_plain(name: str) -> str:
    """What to tell of a name that is not plain."""
    shown = repr(name[:40]) + ("..." if len(name) > 40 else "")
    return (
        f"{shown} is no name of a shard: at most {MOST_NAME} letters (a-z, A-Z), digits and _ . -, the first no dot or "
        "dash; rename the file"
    )


def _check_plain(name: str) -> str:
    if not is_plain(name):
        raise ValueError(why_not_plain(name))
    return name


def _check_extension(extension: str) -> str:
    if not _EXTENSION.fullmatch(extension):
        raise ValueError(f"{extension[:40]!r} is no extension: letters, digits and _ . + -")
    return extension


ShardName = Annotated[str, AfterValidator(_check_plain)]
Shown = Annotated[str, AfterValidator(printable)]
"""Text that messages, terminals and logs show as it is."""
Extension = Annotated[str, AfterValidator(_check_extension)]
Count = Annotated[int, Field(ge=0)]


class Member(Section):
    """What the members of one extension hold. Members that are no arrays (images, labels) have neither field."""

    dtype: DType | None = None
    """NumPy dtype string of an .npy member, such as `uint16`."""
    shape: Annotated[tuple[Count, ...], Field(max_length=8)] | None = None
    """Shape of an .npy member, the same for every sample."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the array of a sample; 0 for members that are no arrays."""
        if self.shape is None or self.dtype is None:
            return 0
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.dtype is None) != (self.shape is None):
            raise ValueError("an array has a dtype and a shape")
        if self.num_bytes > _MOST_MEMBER_BYTES:
            raise ValueError(f"an array of a sample has {self.num_bytes} bytes; at most {_MOST_MEMBER_BYTES} are read")
        return self


class MadeBy(Section):
    """What made a set, and how."""

    name: Shown
    """Tokenizer or teacher (or reader, for images), as a person names it."""
    identity: Shown = ""
    """Hash of the weights (mepa_ds.files.identity_of_weights); empty for images."""
    settings: Annotated[dict[str, Any], AfterValidator(printable_json)] = Field(default_factory=dict)
    """Everything else that the content depends on: scales, codebook size, codec, views, image side..."""


class ShardEntry(Section):
    """One shard of a set."""

    name: ShardName
    """File name, such as `shard-000000.tar`; never a path."""
    num_samples: Count
    bytes: Annotated[int, Field(ge=0, le=_MOST_SHARD_BYTES)]
    sha256: Shown
    """SHA-256 of the tar file; empty if unknown (a set that others made)."""
    keys_sha256: Shown
    """SHA-256 of the keys in order, each ended by a newline."""
    skipped: tuple[Shown, ...] = ()
    """Damaged source images that were left out of this shard, with the reason."""


class ShardIndex(Section):
    """The content of `index.json`."""

    # cached_property writes to __dict__, which frozen models allow; ignored_types keeps pydantic from taking it.
    model_config = ConfigDict(ignored_types=(cached_property,))

    version: Literal[1] = 1
    kind: Kind
    shards: tuple[ShardEntry, ...]
    members: Annotated[dict[Extension, Member], Field(max_length=MOST_EXTENSIONS)]
    """Members of a sample by extension, without the leading dot."""
    classes: tuple[Shown, ...] = ()
    """Class names by label; empty when unknown."""
    made_by: MadeBy

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_samples > _MOST_SAMPLES:
            raise ValueError(f"the shards have {self.num_samples} samples; at most {_MOST_SAMPLES} are read")
        # Memory is taken by this number, so a large one must be possible. Each shard is checked when it is read.
        if self.num_samples > MANY_SAMPLES:
            for shard in self.shards:
                if shard.num_samples > shard.bytes // BLOCK:  # each has a header at least
                    raise ValueError(f"{shard.name}: {shard.num_samples} samples do not fit in {shard.bytes} bytes")
        stems = [offset_index_path(Path(shard.name)).name for shard in self.shards]
        if len(set(stems)) < len(stems):
            twice = next(shard.name for place, shard in enumerate(self.shards) if stems[place] in stems[:place])
            raise ValueError(f"the shard {twice} has another one's name; names in a set are unique")
        return self

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @cached_property
    def keys_sha256(self) -> str:
        """Equal for two sets exactly when their shards hold the same keys in the same order."""
        return hashlib.sha256("\n".join(shard.keys_sha256 for shard in self.shards).encode()).hexdigest()

    @classmethod
    def read(cls, directory: Path, what: str = "shards") -> ShardIndex:
        """Reads `directory/index.json`; `what` is the name of the setting for the error message.

        Raises:
            UserError: no such directory or file, or a file that does not hold an index.
        """
        path = directory / INDEX_NAME
        if not directory.is_dir():
            raise UserError(
                f"{what}: {directory}: no such directory; give a shard set, or make one with `mepa data build`"
            )
        if not path.exists():
            raise UserError(
                f"{what}: {directory}: no {INDEX_NAME} there; if a job is still writing the set, wait for it (or run "
                "it again, or `mepa data merge DIR`, which says what is missing); for shards that "
                "others made, run `mepa data scan DIR`"
            )
        try:
            data = read_json_object(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{what}: {path}: cannot be read: {error}; make the set again") from error
        return validate(cls, data, f"{what}: {path}")

    def write(self, directory: Path) -> None:
        with naming_full_disks(directory / INDEX_NAME):
            write_json(directory / INDEX_NAME, self.model_dump(mode="json"))


def keys_digest(offset_index: OffsetIndex) -> str:
    return hashlib.sha256(b"".join(key + b"\n" for key in offset_index.keys_N.tolist())).hexdigest()


FOREIGN = MadeBy(name="webdataset")
"""The maker of shards that others made. Their index has checksums only if `mepa data scan` wrote it."""


def images_identity(index: ShardIndex) -> str:
    """Names the content of an image set: checksums, or keys and sizes of shards that others made.

    Sets that are derived from it store this as `made_by.settings["images"]`. Keys and sizes do not tell the sets of
    build_shards.py apart: keys there are numbers, and other labels or another order may have the same sizes.
    """
    foreign = index.made_by == FOREIGN
    lines = [f"{shard.name} {shard.bytes} {shard.keys_sha256 if foreign else shard.sha256}\n" for shard in index.shards]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def source_images(index: ShardIndex) -> str | None:
    """Identity of the images that a set holds or was made from (`images_identity`); None if the index has none."""
    return images_identity(index) if index.kind == "images" else index.made_by.settings.get("images")


def offset_index_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}.idx.npz")


class Description(Section):
    """What an offset index says of its shard beside the offsets."""

    entry: ShardEntry
    members: dict[str, Member]
    mtime_ns: int | None = None
    """Time of the tar when its headers were read, for shards that others made. None for shards that this project wrote:
    for these equal content has equal offset indices, and size and SHA-256 in the index say whether the tar is whole."""
    left_out: dict[Shown, tuple[Count, tuple[Shown, ...]]] = Field(default_factory=dict)
    """Members that belong to no sample (LeftOut); only for shards that others made."""

    def is_of(self, shard: Path) -> bool:
        """Whether the file at this path is the one that was described. A file of another time is another file: a
        replaced shard may be older, and its size the same, since tars are padded."""
        found = shard.stat()
        same_time = self.mtime_ns is None or self.mtime_ns == found.st_mtime_ns
        return self.entry.name == shard.name and self.entry.bytes == found.st_size and same_time


def write_offset_index(shard: Path, offset_index: OffsetIndex, description: Description) -> None:
    """Stores a shard's offsets and its own index entry; written last, it marks the shard as complete."""
    path = offset_index_path(shard)
    with naming_full_disks(path), atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            keys=offset_index.keys_N,
            extensions=np.array(offset_index.extensions),
            offsets=offset_index.offsets_NM,
            sizes=offset_index.sizes_NM,
            labels=np.empty(0, np.int64) if offset_index.labels_N is None else offset_index.labels_N,
            description=np.array(json.dumps(description.model_dump(mode="json", exclude=_unset(description)))),
        )


def _unset(description: Description) -> set[str]:
    """Fields without a value, which are written only for shards that others made."""
    return {name for name in ("mtime_ns", "left_out") if getattr(description, name) in (None, {})}


def read_offset_index(shard: Path, kind: Kind, foreign: bool = False) -> OffsetIndex:
    """The offsets of a shard: stored ones, or those found by stepping over its headers.

    Args:
        foreign: whether others made the shard. Its offset index then counts only for the file that was scanned.
            In a copy that did not keep the times, the headers are read again, with the same result.

    Raises:
        DamagedError: the file cannot be read, or does not hold the places of samples in a tar.
    """
    if not offset_index_path(shard).exists():
        return scan_tar(shard, kind)
    offset_index, description = _load_offset_index(shard)
    if foreign and shard.exists() and not description.is_of(shard):
        return scan_tar(shard, kind)
    return offset_index


def _load_offset_index(shard: Path) -> tuple[OffsetIndex, Description]:
    """Raises DamagedError for whatever is wrong with the file."""
    path = offset_index_path(shard)
    try:
        return parse_offset_index(read_file(path, MOST_OFFSET_BYTES))
    except (OSError, ValueError) as error:
        raise DamagedError(
            f"{path}: the offsets cannot be read: {error}; remove this file (offsets are then read from the shard), "
            "or remove the shard too and run what made the set again"
        ) from error


def parse_offset_index(data: bytes) -> tuple[OffsetIndex, Description]:
    """The content of an offset index's file. Raises ValueError for whatever is wrong with it."""
    names = ("keys", "extensions", "offsets", "sizes", "labels", "description")
    stored = read_archive(data, names, MOST_OFFSET_BYTES)
    description = _parse_description(stored["description"])
    labels_n, extensions_M = stored["labels"], stored["extensions"]
    if extensions_M.ndim != 1 or len(extensions_M) > MOST_EXTENSIONS or extensions_M.dtype.kind not in "Uf":
        raise ValueError("its extensions are no short list of texts")  # an empty list is stored as numbers
    if labels_n.shape not in ((0,), stored["keys"].shape):
        raise ValueError(f"its labels are {labels_n.shape}, expected {stored['keys'].shape}")
    offset_index = OffsetIndex(
        keys_N=stored["keys"],
        extensions=tuple(printable(extension) for extension in extensions_M.tolist()),
        offsets_NM=stored["offsets"],
        sizes_NM=stored["sizes"],
        labels_N=labels_n if labels_n.shape == stored["keys"].shape else None,
        left_out=LeftOut.from_json(description.left_out),
    )
    check_offset_index(offset_index)
    return offset_index, description


def _parse_description(stored: NDArray[Any]) -> Description:
    if stored.shape != () or stored.dtype.kind != "U":
        raise ValueError("its description is no text")
    return validate(Description, parse_json(str(stored)), "description")


def stored_description(shard: Path) -> Description | None:
    """What the offset index of a shard says, whether the shard is there or not; None without a whole one."""
    if not offset_index_path(shard).exists():
        return None
    try:
        return _load_offset_index(shard)[1]
    except DamagedError:
        return None


def read_description(shard: Path) -> Description | None:
    """The description beside a complete shard; None if the shard is missing, torn, replaced or foreign."""
    if not shard.exists() or (description := stored_description(shard)) is None:
        return None
    return description if description.is_of(shard) else None
