"""Writes shard sets: deterministic bytes, a shard at a time, complete or absent, by any number of processes.

The plan (what the set will be: kind, classes, maker and the names of all shards) is written first, as
`index.plan.json`. Any process may then write any of the planned shards. Order of the writes for one shard:
its old table goes, the tar is renamed into place, the table is renamed into place. So a shard with a table is
complete, and a process killed at any moment leaves only complete shards and files that the next run replaces.
Whoever finds all planned shards complete turns the plan into `index.json`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mepa_ds.config.base import Section, validate
from mepa_ds.data.shards.index import (
    INDEX_NAME,
    Description,
    MadeBy,
    Member,
    ShardEntry,
    ShardIndex,
    keys_digest,
    read_description,
    table_path,
    write_table,
)
from mepa_ds.data.shards.left_out import few
from mepa_ds.data.shards.offset_index import SampleTable, label_number
from mepa_ds.data.shards.samples import LABEL_EXTENSION, Kind, is_hidden, split_member_name
from mepa_ds.data.shards.tar import check_member_name, member_header
from mepa_ds.data.shards.tar_headers import BLOCK
from mepa_ds.errors import UserError
from mepa_ds.files import atomic_path, naming_full_disks, write_json

PLAN_NAME = "index.plan.json"
SCRATCH_NAME = ".scratch"
"""Directory into which a reader of data_tools/ copies a dataset that cannot be read in place."""

Sample = tuple[str, Mapping[str, bytes]]
"""Key and members by extension (`png`, `cls`, `tokens.npy`)."""


class Plan(Section):
    """What a set will be once all its shards are there."""

    kind: Kind
    shard_names: tuple[str, ...]
    classes: tuple[str, ...] = ()
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
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran or dtype.hasobject:
        raise ValueError("arrays in Fortran order or of Python objects are not read")
    return Member(dtype=str(dtype), shape=tuple(shape)), file.tell()


class ShardWriter:
    """Writes the shards of one planned set into a directory.

    Raises:
        UserError: the directory holds (part of) another set: other settings, other shards.
    """

    def __init__(self, directory: Path, plan: Plan):
        self.directory, self.plan = directory, plan
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / INDEX_NAME).exists():
            index = ShardIndex.read(directory)
            names = tuple(shard.name for shard in index.shards)
            found = Plan(kind=index.kind, shard_names=names, classes=index.classes, made_by=index.made_by)
            self._check_same(found)
            self.plan = found
            return
        if (directory / PLAN_NAME).exists() and not self._is_abandoned():
            found = read_plan(directory)
            self._check_same(found)
            if found.made_by.settings.get("on_damaged") == plan.made_by.settings.get("on_damaged"):
                return
        with naming_full_disks(directory / PLAN_NAME):
            write_json(directory / PLAN_NAME, plan.model_dump(mode="json"))

    def _is_abandoned(self) -> bool:
        """Whether the plan that is there has no shards: its build stopped before the first one. It may be replaced."""
        return {path.name for path in self.directory.iterdir()} <= {PLAN_NAME, SCRATCH_NAME}

    def _check_same(self, found: Plan, under_way: bool = False) -> None:
        # Compared as JSON, so that a list and a tuple in free-form settings are the same.
        ours, theirs = (json.loads(plan.model_dump_json()) for plan in (self.plan, found))
        our_settings, their_settings = (plan["made_by"]["settings"] for plan in (ours, theirs))
        goes_on = (their_settings.get("on_damaged"), our_settings.get("on_damaged")) == ("stop", "skip")
        if goes_on or (under_way and "on_damaged" in our_settings):  # shards written under "stop" are whole
            their_settings["on_damaged"] = our_settings["on_damaged"]
        if ours == theirs:
            return
        flat_ours, flat_theirs = _flat(ours), _flat(theirs)
        differences = [
            f"{key} {flat_theirs.get(key)!r} there, {flat_ours.get(key)!r} now"
            for key in sorted(flat_ours.keys() | flat_theirs.keys())
            if flat_ours.get(key) != flat_theirs.get(key)
        ]
        shown = "; ".join(text if len(text) < 200 else text[:200] + "..." for text in differences[:5])
        raise UserError(
            f"{self.directory}: holds a set made with other settings ({shown}); "
            "write to another directory, or remove this one"
        )

    def is_complete(self, name: str) -> bool:
        """Whether this shard is already there, whole."""
        return read_description(self.directory / name) is not None

    def missing(self) -> list[str]:
        """Planned shards that are not there yet."""
        return [name for name in self.plan.shard_names if not self.is_complete(name)]

    def write_shard(self, name: str, samples: Iterable[Sample], skipped: Sequence[str] = ()) -> ShardEntry:
        """Writes one shard, replacing what is there under its name.

        Args:
            name: one of the planned names.
            samples: in the order of the file; keys unique within the set.
            skipped: notes on samples that were left out; read after `samples` is exhausted.

        Raises:
            UserError: a key that comes twice, members whose type changes, or a full disk.
        """
        assert name in self.plan.shard_names, name
        if (self.directory / PLAN_NAME).exists():  # another build's, if one with other settings began at the same time
            self._check_same(read_plan(self.directory), under_way=True)
        path = self.directory / name
        table_path(path).unlink(missing_ok=True)
        with naming_full_disks(path), atomic_path(path) as temporary, open(temporary, "wb") as file:
            tar = _TarFile(file, str(path))
            for key, members in samples:
                tar.add(key, members)
            tar.close()
        table = replace(SampleTable.of(tar.samples), labels_N=tar.labels_N())
        entry = ShardEntry(
            name=name,
            num_samples=len(table),
            bytes=path.stat().st_size,
            sha256=tar.digest.hexdigest(),
            keys_sha256=keys_digest(table),
            skipped=tuple(skipped),
        )
        write_table(path, table, Description(entry=entry, members=tar.members))
        return entry

    def finish(self) -> ShardIndex | None:
        """Writes `index.json` once every planned shard is complete; None while some are missing."""
        return None if self.missing() else finish_index(self.directory, self.plan)


def read_plan(directory: Path) -> Plan:
    path = directory / PLAN_NAME
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; nothing was started here, or start it again") from error
    return validate(Plan, data, str(path))


def finish_index(directory: Path, plan: Plan) -> ShardIndex:
    """Gathers the entries of all planned shards into `index.json` and removes the plan.

    Raises:
        UserError: planned shards are missing, hold different kinds of members, or no samples at all.
    """
    found = {name: read_description(directory / name) for name in plan.shard_names}
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
        kind=plan.kind,
        shards=tuple(description.entry for description in descriptions),
        members=members,
        classes=plan.classes,
        made_by=plan.made_by,
    )
    try:
        index.write(directory)
    except FileNotFoundError:  # another process finished the set at the same moment and cleaned up
        if not (directory / INDEX_NAME).exists():
            raise
    (directory / PLAN_NAME).unlink(missing_ok=True)
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


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, to name differences."""
    if not isinstance(data, dict):
        return {prefix: data}
    result: dict[str, Any] = {}
    for key, value in data.items():
        result.update(_flat(value, f"{prefix}.{key}" if prefix else key))
    return result
