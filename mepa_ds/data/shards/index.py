"""A shard set's `index.json`: what is in the set, how much, and what made it; and the offsets beside each shard.

A set is a directory of WebDataset tars `shard-000000.tar`, an offset index `shard-000000.idx.npz` beside each, and
one `index.json`. Tokens and features are sets of their own with the same keys in the same order as the images
they come from, shard by shard: their `keys_sha256` are equal.
"""

from __future__ import annotations

import hashlib
import io
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from mepa_ds.config.base import Section, validate
from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.offset_index import OffsetIndex, scan_tar
from mepa_ds.data.shards.samples import Kind
from mepa_ds.errors import DamagedError, UserError
from mepa_ds.files import atomic_path, naming_full_disks, read_file, write_json

INDEX_NAME = "index.json"


class Member(Section):
    """What the members of one extension hold. Members that are no arrays (images, labels) have neither field."""

    dtype: str | None = None
    """NumPy dtype string of an .npy member, such as `uint16`."""
    shape: tuple[int, ...] | None = None
    """Shape of an .npy member, the same for every sample."""


class MadeBy(Section):
    """What made a set, and how."""

    name: str
    """Tokenizer or teacher (or reader, for images), as a person names it."""
    identity: str = ""
    """Hash of the weights (mepa_ds.files.identity_of_weights); empty for images."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Everything else that the content depends on: scales, codebook size, codec, views, image side..."""


class ShardEntry(Section):
    """One shard of a set."""

    name: Annotated[str, Field(pattern=r"^[^/]*[^/.][^/]*$")]
    """File name, such as `shard-000000.tar`; never a path."""
    num_samples: int
    bytes: int
    sha256: str
    """SHA-256 of the tar file; empty if unknown (a set that others made)."""
    keys_sha256: str
    """SHA-256 of the keys in order, each ended by a newline."""
    skipped: tuple[str, ...] = ()
    """Damaged source images that were left out of this shard, with the reason."""


class ShardIndex(Section):
    """The content of `index.json`."""

    # cached_property writes to __dict__, which frozen models allow; ignored_types keeps pydantic from taking it.
    model_config = ConfigDict(ignored_types=(cached_property,))

    version: Literal[1] = 1
    kind: Kind
    shards: tuple[ShardEntry, ...]
    members: dict[str, Member]
    """Members of a sample by extension, without the leading dot."""
    classes: tuple[str, ...] = ()
    """Class names by label; empty when unknown."""
    made_by: MadeBy

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
            data = json.loads(path.read_text())
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
    left_out: dict[str, tuple[int, tuple[str, ...]]] = Field(default_factory=dict)
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
    """
    if not offset_index_path(shard).exists():
        return scan_tar(shard, kind)
    stored = _load_offset_index(shard)
    description = _description(shard, stored)
    if foreign and shard.exists() and not description.is_of(shard):
        return scan_tar(shard, kind)
    labels = stored["labels"]
    return OffsetIndex(
        keys_N=stored["keys"],
        extensions=tuple(str(extension) for extension in stored["extensions"]),
        offsets_NM=stored["offsets"],
        sizes_NM=stored["sizes"],
        labels_N=labels if len(labels) == len(stored["keys"]) else None,
        left_out=LeftOut.from_json(description.left_out),
    )


def _load_offset_index(shard: Path) -> dict[str, NDArray[Any]]:
    """Raises DamagedError for whatever is wrong with the file."""
    path = offset_index_path(shard)
    try:
        with np.load(io.BytesIO(read_file(path))) as stored:
            return {name: stored[name] for name in ("keys", "extensions", "offsets", "sizes", "labels", "description")}
    except Exception as error:  # zipfile and NumPy raise a dozen kinds for bytes that changed; CRCs are checked
        reason = str(error) or type(error).__name__
        raise DamagedError(
            f"{path}: the offsets cannot be read: {reason}; remove this file (offsets are then read from the shard), "
            "or remove the shard too and run what made the set again"
        ) from error


def _description(shard: Path, stored: dict[str, NDArray[Any]]) -> Description:
    return validate(Description, json.loads(str(stored["description"])), str(offset_index_path(shard)))


def stored_description(shard: Path) -> Description | None:
    """What the offset index of a shard says, whether the shard is there or not; None without a whole one."""
    if not offset_index_path(shard).exists():
        return None
    try:
        return _description(shard, _load_offset_index(shard))
    except DamagedError:
        return None


def read_description(shard: Path) -> Description | None:
    """The description beside a complete shard; None if the shard is missing, torn, replaced or foreign."""
    if not shard.exists() or (description := stored_description(shard)) is None:
        return None
    return description if description.is_of(shard) else None
