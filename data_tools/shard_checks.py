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
from mepa_ds.data.shards.index import ShardIndex, keys_digest, offset_index_path, read_offset_index
from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.offset_index import OffsetIndex, label_number, scan_tar
from mepa_ds.data.shards.samples import LABEL_EXTENSION, most_bytes
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
    offset_index = scan_tar(path, shards.index.kind)
    report.left_out = offset_index.left_out
    if offset_index_path(path).exists() and not _same_offset_index(shards.index, path, offset_index):
        report.problems.append("its stored offsets differ from the tar")
    if len(offset_index) != entry_.num_samples or keys_digest(offset_index) != entry_.keys_sha256:
        report.problems.append(f"its {len(offset_index)} keys are not those of the index")
    report.keys = [bytes(key) for key in offset_index.keys_N]
    with open(path, "rb") as file:
        for row in range(len(offset_index) if decode else 0):
            members = {}
            for column, extension in enumerate(offset_index.extensions):
                if (size := int(offset_index.sizes_NM[row, column])) >= 0:
                    file.seek(int(offset_index.offsets_NM[row, column]))
                    members[extension] = file.read(min(size, most_bytes(extension) + 1))
            try:
                _check_sample(shards.index, members, offset_index.key(row), report)
            except DamagedError as error:
                report.problems.append(str(error))


def _same_offset_index(index: ShardIndex, path: Path, offset_index: OffsetIndex) -> bool:
    try:
        # The stored one, even where the loader would read the headers again.
        stored = read_offset_index(path, index.kind)
    except DamagedError:
        return False
    if stored.extensions != offset_index.extensions or len(stored) != len(offset_index):
        return False
    if len(offset_index) == 0:  # all its images were left out: no columns either
        return True
    if stored.labels_N is not None and not (stored.labels_N == _labels(path, offset_index)).all():
        return False
    pairs = (
        (stored.keys_N, offset_index.keys_N),
        (stored.offsets_NM, offset_index.offsets_NM),
        (stored.sizes_NM, offset_index.sizes_NM),
    )
    return all(bool((ours == theirs).all()) for ours, theirs in pairs)


def _labels(path: Path, offset_index: OffsetIndex) -> NDArray[np.int64]:
    """The numbers in the `cls` members; -1 where there is no number."""
    column = offset_index.extensions.index(LABEL_EXTENSION)
    labels = []
    with open(path, "rb") as file:
        for offset, size in zip(offset_index.offsets_NM[:, column], offset_index.sizes_NM[:, column], strict=True):
            file.seek(int(offset))
            label = label_number(file.read(min(max(int(size), 0), most_bytes(LABEL_EXTENSION))))
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
        if len(data) > (most := most_bytes(extension)):
            raise DamagedError(f"{where}: .{extension} has more than the {most} bytes that are read")
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
    if (len(data) - start) % np.dtype(member.dtype).itemsize:
        raise DamagedError(f"{where}: .{extension} is cut short")
    values: NDArray[Any] = np.frombuffer(data, np.dtype(member.dtype), offset=start)
    if values.nbytes != member.num_bytes:
        raise DamagedError(f"{where}: .{extension} is cut short")
    codebook = index.made_by.settings.get("codebook_size")
    if extension == TOKENS_EXT and isinstance(codebook, int) and ((values >= codebook) | (values < 0)).any():
        raise DamagedError(f"{where}: code {np.max(values)} is outside the codebook of {codebook}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DamagedError(f"{where}: .{extension} has values that are not finite")
