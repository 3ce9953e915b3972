"""A Hugging Face parquet export: an image column (bytes in a struct) and a label column."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mepa_ds.data.shards.index import MadeBy
from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.samples import HIDDEN, is_hidden
from mepa_ds.data.shards.writer import Manifest, Sample, ShardWriter, shard_name
from mepa_ds.data_tools.readers.patterns import check_files
from mepa_ds.data_tools.readers.source import COPIED_FROM
from mepa_ds.data_tools.readers.tar_members import TarMembers
from mepa_ds.data_tools.readers.webdataset import WebDataset
from mepa_ds.errors import UserError
from mepa_ds.files import again, may_pass
from mepa_ds.progress import Progress
from mepa_ds.safety.reading import parse_json

_OF_A_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}.*\.parquet")


@dataclass(frozen=True)
class Parquet:
    """DIR/*.parquet as `datasets` exports them. Rows cannot be read one by one, so they are copied to tars first."""

    root: Path
    """Directory of the parquet files."""
    pattern: str = "*.parquet"
    """Which files of the directory, such as train-*.parquet."""
    image_column: str = "image"
    label_column: str = "label"

    def open(self, scratch: Path | None) -> TarMembers:
        files, left_out = self._files(), LeftOut()
        for path in sorted(self.root.glob(self.pattern)):
            if path not in files:
                left_out.add(HIDDEN, path.name)
        left_out.note(self.root)
        if scratch is None:
            raise UserError("parquet: rows are copied to tars first; run this in one part, without --num-parts")
        tables = [_open(path) for path in files]
        for path, table in zip(files, tables, strict=True):
            missing = {self.image_column, self.label_column} - set(table.schema_arrow.names)
            if missing:
                raise UserError(
                    f"{path}: has no column {sorted(missing)[0]!r}, only {table.schema_arrow.names}; "
                    "give --image-column and --label-column"
                )
            _check_label_type(path, table, self.label_column)
        names = _class_names(tables[0], self.label_column)
        self._copy(files, tables, scratch, names)
        source = WebDataset(str(scratch)).open(None)
        source.name = "parquet"
        source.classes = names or source.classes
        source.settings[COPIED_FROM] = self.copied_from()
        return source

    def copied_from(self) -> str:
        listing = [f"{path.name} {path.stat().st_size}" for path in self._files()]
        return hashlib.sha256("\n".join([*listing, self.image_column, self.label_column]).encode()).hexdigest()[:16]

    def _files(self) -> list[Path]:
        files = sorted(path for path in self.root.glob(self.pattern) if not is_hidden(path.name))
        if not files:
            raise UserError(f"--root: {self.root}: no files {self.pattern} there")
        splits = sorted({match[1] for path in files if (match := _OF_A_SPLIT.fullmatch(path.name))})
        if len(splits) > 1:
            raise UserError(
                f"--root: {self.root}: holds files of several splits ({', '.join(splits)}); choose one, such as "
                f"--pattern '{splits[-1]}-*.parquet'"
            )
        check_files(list(map(str, files)), "--root", "parquet file")
        return files

    def _copy(self, files: list[Path], tables: list[Any], scratch: Path, names: tuple[str, ...]) -> None:
        """One tar of original bytes for each file; files that are copied already are not read again."""
        made_by = MadeBy(name="parquet", settings={"copied_from": self.copied_from()})
        shards = tuple(shard_name(number) for number in range(len(files)))
        manifest = Manifest(kind="images", shard_names=shards, made_by=made_by)
        writer = _scratch_writer(scratch, manifest)
        total = sum(table.metadata.num_rows for table in tables)
        with Progress(total=total, desc="copying parquet", unit="row") as progress:
            for path, table, shard in zip(files, tables, shards, strict=True):
                if not writer.is_complete(shard):
                    self._copy_file(path, writer, shard, len(names), progress)
                else:
                    progress.update(table.metadata.num_rows)
        writer.finish()

    def _copy_file(self, path: Path, writer: ShardWriter, shard: str, num_classes: int, progress: Any) -> None:
        """Copies one file. Its shard appears whole or not at all, so a failed copy can be begun again."""
        try:
            again(lambda: writer.write_shard(shard, self._samples(path, _open(path), num_classes, progress)))
        except OSError as error:
            raise UserError(f"{path}: cannot be copied: {error.strerror or error}; mend that, and run again") from error

    def _samples(self, path: Path, table: Any, num_classes: int, progress: Any) -> Iterator[Sample]:
        row = 0
        for batch in _batches(path, table, [self.image_column, self.label_column]):
            for image, label in zip(batch[self.image_column], batch[self.label_column], strict=True):
                data, where = _image_bytes(image.as_py()), f"{path}: row {row}"
                if data is None:
                    raise UserError(
                        f"{where}: column {self.image_column!r} holds no image bytes; export the dataset with "
                        "embedded images, or give another --image-column"
                    )
                number = _label_number(label.as_py(), num_classes, where)
                yield f"{path.stem.replace('.', '-')}-{row:09d}", {_kind(data): data, "cls": str(number).encode()}
                row += 1
                progress.update()


def _scratch_writer(scratch: Path, manifest: Manifest) -> ShardWriter:
    """The writer of the copies. What a killed build copied from other files or columns is removed first."""
    try:
        return ShardWriter(scratch, manifest)
    except UserError:
        shutil.rmtree(scratch)
        return ShardWriter(scratch, manifest)


def _open(path: Path) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        return again(lambda: ParquetFile(path))
    except (ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _batches(path: Path, table: Any, columns: list[str]) -> Iterator[Any]:
    """Raises OSError only for errors that may pass (`again`)."""
    from pyarrow import ArrowException

    try:
        yield from table.iter_batches(batch_size=64, columns=columns)
    except (ArrowException, OSError) as error:
        if may_pass(error):
            raise
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.errno is not None:  # errors of the content have no number
        return UserError(f"{path}: cannot be read: {os.strerror(error.errno)}; mend that, and run again")
    return UserError(f"{path}: cannot be read as parquet: {' '.join(str(error).split())}; download it again")


def _image_bytes(value: Any) -> bytes | None:
    """Bytes of a cell: empty for null, which then counts as a damaged image; None for a cell that holds no bytes."""
    if isinstance(value, dict):  # a path alone says that the image is not embedded
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        return b""
    return value if isinstance(value, bytes) else None


def _kind(data: bytes) -> str:
    """File extension by the first bytes. Bytes that are no image are noticed when they are decoded."""
    if data[:4] == b"\x89PNG":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return "jpg" if data[:2] == b"\xff\xd8" else "tiff"


def _class_names(table: Any, column: str) -> tuple[str, ...]:
    """From the `datasets` library's note in the file; empty if there is none."""
    note = (table.schema_arrow.metadata or {}).get(b"huggingface")
    try:
        names = parse_json(note or b"")["info"]["features"][column]["names"]
    except (ValueError, LookupError, TypeError):  # no note, or one of another kind: labels are numbers then
        return ()
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_list else ()


def _check_label_type(path: Path, table: Any, column: str) -> None:
    from pyarrow import types

    kind = table.schema_arrow.field(column).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    if not any(is_kind(values) for is_kind in (types.is_integer, types.is_boolean, types.is_floating, types.is_null)):
        raise UserError(
            f"{path}: column {column!r} holds {kind} values, but labels are numbers from 0 up; number the classes "
            f"(with `datasets`: dataset.class_encode_column({column!r})), or give another --label-column"
        )


def _label_number(label: Any, num_classes: int, where: str) -> int:
    """Floats that are whole numbers are labels too: pandas makes them of a column that once had a gap."""
    if label is None:
        raise UserError(f"{where}: has no label; is this a split without labels?")
    if not math.isfinite(label) or label != int(label):
        raise UserError(f"{where}: label {label} is no whole number; mend it, or give another --label-column")
    if label < 0 or (num_classes and label >= num_classes):
        raise UserError(f"{where}: label {label} is out of range; is this a split without labels?")
    return int(label)
