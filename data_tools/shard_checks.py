"""Checks of one shard by itself, without regard to others."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mepa_ds.data.images import image_member
from mepa_ds.data.shard_set import ShardSet, parse_label
from mepa_ds.data.shards.index import ShardIndex, keys_digest, read_table, table_path
from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.offset_index import SampleTable, label_number, scan_tar
from mepa_ds.data.shards.samples import LABEL_EXTENSION
from mepa_ds.data.shards.writer import read_npy_header
from mepa_ds.data.training_sets import TOKENS_EXT
from mepa_ds.errors import DamagedError
from mepa_ds.files import sha256_of_file
from mepa_ds.images.decoding import decode_image


@dataclass
class ShardReport:
    """What was found in one shard."""

    shard: int
    problems: list[str] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    contents: list[tuple[bytes, str]] = field(default_factory=list)
    """A digest of each image, and its key."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Members that belong to no sample."""


def check_shard(shards: ShardSet, decode: bool, number: int) -> ShardReport:
    """Finds whatever is wrong with one shard by itself."""
    report = ShardReport(number)
    try:
        _check_shard(shards, decode, report)
    except DamagedError as error:
        report.problems.append(str(error))
    except OSError as error:  # a failing disk is damage too, and no reason to leave the other shards unchecked
        report.problems.append(f"cannot be read: {error.strerror or error}")
    return report


def _check_shard(shards: ShardSet, decode: bool, report: ShardReport) -> None:
    path, entry_ = shards.shard_paths[report.shard], shards.index.shards[report.shard]
    if not path.exists():
        report.problems.append("is missing")
        return
    if path.stat().st_size != entry_.bytes:
        report.problems.append(f"has {path.stat().st_size} bytes, the index says {entry_.bytes}")
    elif entry_.sha256 and sha256_of_file(path) != entry_.sha256:
        report.problems.append("its SHA-256 differs from the index's")
    table = scan_tar(path, shards.index.kind)
    report.left_out = table.left_out
    if table_path(path).exists() and not _same_table(shards.index, path, table):
        report.problems.append("its stored offsets differ from the tar")
    if len(table) != entry_.num_samples or keys_digest(table) != entry_.keys_sha256:
        report.problems.append(f"its {len(table)} keys are not those of the index")
    report.keys = [bytes(key) for key in table.keys_N]
    with open(path, "rb") as file:
        for row in range(len(table) if decode else 0):
            members = {}
            for column, extension in enumerate(table.extensions):
                if table.sizes_NM[row, column] >= 0:
                    file.seek(int(table.offsets_NM[row, column]))
                    members[extension] = file.read(int(table.sizes_NM[row, column]))
            try:
                _check_sample(shards.index, members, table.key(row), report)
            except DamagedError as error:
                report.problems.append(str(error))


def _same_table(index: ShardIndex, path: Path, table: SampleTable) -> bool:
    try:
        stored = read_table(path, index.kind)  # the stored table, even where the loader would read the headers again
    except DamagedError:
        return False
    if stored.extensions != table.extensions or len(stored) != len(table):
        return False
    if len(table) == 0:  # all its images were left out: no columns either
        return True
    if stored.labels_N is not None and not (stored.labels_N == _labels(path, table)).all():
        return False
    pairs = ((stored.keys_N, table.keys_N), (stored.offsets_NM, table.offsets_NM), (stored.sizes_NM, table.sizes_NM))
    return all(bool((ours == theirs).all()) for ours, theirs in pairs)


def _labels(path: Path, table: SampleTable) -> NDArray[np.int64]:
    """The numbers in the `cls` members; -1 where there is no number."""
    column = table.extensions.index(LABEL_EXTENSION)
    labels = []
    with open(path, "rb") as file:
        for offset, size in zip(table.offsets_NM[:, column], table.sizes_NM[:, column], strict=True):
            file.seek(int(offset))
            label = label_number(file.read(max(int(size), 0)))
            labels.append(-1 if label is None else label)
    return np.array(labels, np.int64)


def _check_sample(index: ShardIndex, members: dict[str, bytes], key: str, report: ShardReport) -> None:
    where = f"sample {key!r}"
    if LABEL_EXTENSION in members:
        report.labels.append(parse_label(members[LABEL_EXTENSION], len(index.classes), lambda: where))
    if index.kind == "images":
        _, data = image_member(members, where)
        decode_image(data, where)
        report.contents.append((hashlib.sha256(data).digest()[:16], key))
    for extension, data in members.items():
        if extension.endswith("npy"):
            _check_array(index, extension, data, where)


def _check_array(index: ShardIndex, extension: str, data: bytes, where: str) -> None:
    try:
        member, start = read_npy_header(data)
    except ValueError as error:
        raise DamagedError(f"{where}: .{extension} is no array: {error}") from error
    expected = index.members.get(extension)
    if expected is not None and expected.shape is not None and member != expected:
        raise DamagedError(
            f"{where}: .{extension} holds {member.dtype} {member.shape}, expected {expected.dtype} {expected.shape}"
        )
    assert member.shape is not None
    values: NDArray[Any] = np.frombuffer(data, np.dtype(member.dtype), offset=start)
    if values.size != int(np.prod(member.shape)):
        raise DamagedError(f"{where}: .{extension} is cut short")
    codebook = index.made_by.settings.get("codebook_size")
    if extension == TOKENS_EXT and codebook is not None and (values >= codebook).any():
        raise DamagedError(f"{where}: code {np.max(values)} is outside the codebook of {codebook}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DamagedError(f"{where}: .{extension} has values that are not finite")
