"""Writes shard sets: deterministic bytes, a shard at a time, complete or absent, by any number of processes.

The manifest (what the set will be: kind, classes, maker and the names of all shards) is written first, as
`index.plan.json`. Any process may then write any of the shards it names. Order of the writes for one shard:
its old offset index goes, the tar is renamed into place, the offset index too. So a shard with an offset index is
complete, and a process killed at any moment leaves only complete shards and files that the next run replaces.
Whoever finds all named shards complete turns the manifest into `index.json`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
from numpy.typing import NDArray

from mepa_ds.config.base import Section, validate
from mepa_ds.config.changes import changed
from mepa_ds.data.shards.index import (
    INDEX_NAME,
    Description,
    DType,
    MadeBy,
    Member,
    ShardEntry,
    ShardIndex,
    ShardName,
    Shown,
    keys_digest,
    offset_index_path,
    read_description,
    write_offset_index,
)
from mepa_ds.data.shards.left_out import few
from mepa_ds.data.shards.offset_index import OffsetIndex, label_number
from mepa_ds.data.shards.samples import LABEL_EXTENSION, Kind, is_hidden, split_member_name
from mepa_ds.data.shards.tar import check_member_name, member_header
from mepa_ds.data.shards.tar_headers import BLOCK
from mepa_ds.errors import UserError
from mepa_ds.files import atomic_path, check_regular, naming_full_disks, write_json
from mepa_ds.safety.reading import MOST_JSON_BYTES, array_header, parse_json

MANIFEST_NAME = "index.plan.json"
SCRATCH_NAME = ".scratch"
"""Directory into which a reader of data_tools/ copies a dataset that cannot be read in place."""

Sample = tuple[str, Mapping[str, bytes]]
"""Key and members by extension (`png`, `cls`, `tokens.npy`)."""


class Manifest(Section):
    """What a set will be once all its shards are there."""

    kind: Kind
    shard_names: tuple[ShardName, ...]
    classes: tuple[Shown, ...] = ()
    made_by: MadeBy


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def npy_bytes(array: NDArray[Any]) -> bytes:
    """The array as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def read_npy_header(data: bytes) -> tuple[Member, int]:
    """(dtype and shape, bytes of the header) of an .npy file. Raises ValueError if it is none."""
    header = array_header(data)
    if header.is_fortran:
        raise ValueError("arrays in Fortran order are not read")
    if (dtype := str(header.dtype)) not in get_args(DType):
        raise ValueError(f"arrays of {dtype} are not read; expected {', '.join(get_args(DType))}")
    return Member(dtype=dtype, shape=tuple(header.shape)), header.start  # type: ignore[arg-type]


class ShardWriter:
    """Writes the shards that one manifest names into a directory.

    Raises:
        UserError: the directory holds (part of) another set: other settings, other shards.
    """

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / INDEX_NAME).exists():
            index = ShardIndex.read(directory)
            names = tuple(shard.name for shard in index.shards)
            found = Manifest(kind=index.kind, shard_names=names, classes=index.classes, made_by=index.made_by)
            self._check_same(found)
            self.manifest = found
            return
        if (directory / MANIFEST_NAME).exists() and not self._is_abandoned():
            found = read_manifest(directory)
            self._check_same(found)
            if found.made_by.settings.get("on_damaged") == manifest.made_by.settings.get("on_damaged"):
                return
        with naming_full_disks(directory / MANIFEST_NAME):
            write_json(directory / MANIFEST_NAME, manifest.model_dump(mode="json"))

    def _is_abandoned(self) -> bool:
        """Whether the plan that is there has no shards: its build stopped before the first one. It may be replaced."""
        return {path.name for path in self.directory.iterdir()} <= {MANIFEST_NAME, SCRATCH_NAME}

    def _check_same(self, found: Manifest, under_way: bool = False) -> None:
        # Compared as JSON, so that a list and a tuple in free-form settings are the same.
        ours, theirs = (json.loads(manifest.model_dump_json()) for manifest in (self.manifest, found))
        our_settings, their_settings = (manifest["made_by"]["settings"] for manifest in (ours, theirs))
        goes_on = (their_settings.get("on_damaged"), our_settings.get("on_damaged")) == ("stop", "skip")
        if goes_on or (under_way and "on_damaged" in our_settings):  # shards written under "stop" are whole
            their_settings["on_damaged"] = our_settings["on_damaged"]
        if ours == theirs:
            return
        differences = [f"{key} {there!r} there, {here!r} now" for key, (there, here) in changed(theirs, ours).items()]
        shown = "; ".join(text if len(text) < 200 else text[:200] + "..." for text in differences[:5])
        raise UserError(
            f"{self.directory}: holds a set made with other settings ({shown}); "
            "write to another directory, or remove this one"
        )

    def is_complete(self, name: str) -> bool:
        """Whether this shard is already there, whole."""
        return read_description(self.directory / name) is not None

    def missing(self) -> list[str]:
        """Named shards that are not there yet."""
        return [name for name in self.manifest.shard_names if not self.is_complete(name)]

    def write_shard(self, name: str, samples: Iterable[Sample], skipped: Sequence[str] = ()) -> ShardEntry:
        """Writes one shard, replacing what is there under its name.

        Args:
            name: one of the manifest's names.
            samples: in the order of the file; keys unique within the set.
            skipped: notes on samples that were left out; read after `samples` is exhausted.

        Raises:
            UserError: a key that comes twice, members whose type changes, or a full disk.
        """
        assert name in self.manifest.shard_names, name
        if (
            self.directory / MANIFEST_NAME
        ).exists():  # another build's, if one with other settings began at the same time
            self._check_same(read_manifest(self.directory), under_way=True)
        path = self.directory / name
        offset_index_path(path).unlink(missing_ok=True)
        with naming_full_disks(path), atomic_path(path) as temporary, open(temporary, "wb") as file:
            tar = _TarFile(file, str(path))
            for key, members in samples:
                tar.add(key, members)
            tar.close()
        offset_index = replace(OffsetIndex.of(tar.samples), labels_N=tar.labels_N())
        entry = ShardEntry(
            name=name,
            num_samples=len(offset_index),
            bytes=path.stat().st_size,
            sha256=tar.digest.hexdigest(),
            keys_sha256=keys_digest(offset_index),
            skipped=tuple(skipped),
        )
        write_offset_index(path, offset_index, Description(entry=entry, members=tar.members))
        return entry

    def finish(self) -> ShardIndex | None:
        """Writes `index.json` once every named shard is complete; None while some are missing."""
        return None if self.missing() else finish_index(self.directory, self.manifest)


def read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST_NAME
    try:
        check_regular(path)
        with open(path, "rb") as file:
            data = parse_json(file.read(MOST_JSON_BYTES))  # what is longer is no whole text
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; nothing was started here, or start it again") from error
    return validate(Manifest, data, str(path))


def finish_index(directory: Path, manifest: Manifest) -> ShardIndex:
    """Gathers the entries of all named shards into `index.json` and removes the manifest.

    Raises:
        UserError: named shards are missing, hold different kinds of members, or no samples at all.
    """
    found = {name: read_description(directory / name) for name in manifest.shard_names}
    missing = [name for name, description in found.items() if description is None]
    if missing:
        raise UserError(
            f"{directory}: {len(missing)} of {len(found)} shards are missing ({few(missing)}); run the parts that "
            "write them again"
        )
    descriptions = [description for description in found.values() if description is not None]
    if not any(description.entry.num_samples for description in descriptions):
        skipped = [message for description in descriptions for message in description.entry.skipped]
        raise UserError(
            f"{directory}: the set would be empty: {len(skipped)} samples were left out as damaged "
            f"({few(skipped, 2)}); give the right dataset, and another directory"
        )
    members: dict[str, Member] = {}
    for description in descriptions:
        path = directory / description.entry.name
        for extension, member in description.members.items():
            if members.setdefault(extension, member) != member:
                raise UserError(
                    f"{path}: members .{extension} are {member.dtype} {member.shape}, in other "
                    f"shards {members[extension].dtype} {members[extension].shape}; make the set again"
                )
    index = ShardIndex(
        kind=manifest.kind,
        shards=tuple(description.entry for description in descriptions),
        members=members,
        classes=manifest.classes,
        made_by=manifest.made_by,
    )
    try:
        index.write(directory)
    except FileNotFoundError:  # another process finished the set at the same moment and cleaned up
        if not (directory / INDEX_NAME).exists():
            raise
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    for leftover in directory.glob(".*.tmp"):  # of killed processes: the set is complete, nobody writes any more
        leftover.unlink(missing_ok=True)
    return index


class _TarFile:
    """One tar being written: bytes, digest, offsets and member types in one pass."""

    def __init__(self, file: BinaryIO, where: str):
        self.digest = hashlib.sha256()
        self.samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
        self.members: dict[str, Member] = {}
        self._file, self._where, self._position = file, where, 0
        self._keys: set[str] = set()
        self._labels: list[int | None] = []

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        if key in self._keys:
            raise UserError(f"{self._where}: the key {key!r} comes twice; keys must be unique")
        self._keys.add(key)
        places: dict[str, tuple[int, int]] = {}
        for extension, data in members.items():
            name = f"{key}.{extension}"
            check_member_name(name, self._where)
            if split_member_name(name) != (key, extension) or is_hidden(name):
                raise UserError(
                    f"{self._where}: the key {key!r} has a dot or is hidden, or .{extension} has upper case letters"
                )
            self._note_type(extension, data)
            self._write(member_header(name, len(data)))
            places[extension] = (self._position, len(data))
            self._write(data)
            self._write(b"\0" * (-len(data) % BLOCK))
        self.samples.append((key, places))
        self._labels.append(label_number(members.get(LABEL_EXTENSION, b"")))

    def labels_N(self) -> NDArray[np.int64] | None:
        """Labels of the samples written; None unless all have one that is a number."""
        labels = [label for label in self._labels if label is not None]
        return np.array(labels, np.int64) if len(labels) == len(self._labels) else None

    def close(self) -> None:
        self._write(b"\0" * (2 * BLOCK))
        self._write(b"\0" * (-self._position % (20 * BLOCK)))  # tar's record size; other readers expect whole records

    def _note_type(self, extension: str, data: bytes) -> None:
        member = read_npy_header(data)[0] if extension.endswith("npy") else Member()
        if self.members.setdefault(extension, member) != member:
            known = self.members[extension]
            raise UserError(
                f"{self._where}: members .{extension} differ: {known.dtype} {known.shape} and {member.dtype} "
                f"{member.shape}; all samples of a set have one type"
            )

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self._position += len(data)
