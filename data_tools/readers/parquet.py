"""A Hugging Face parquet export: an image column (bytes in a struct) and a label column."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.readers.source import COPIED_FROM
from data_tools.readers.tar_members import TarMembers
from data_tools.readers.webdataset import WebDataset
from mepa_ds.data.index import MadeBy
from mepa_ds.data.left_out import LeftOut
from mepa_ds.data.samples import HIDDEN, is_hidden
from mepa_ds.data.writer import Plan, Sample, ShardWriter, shard_name
from mepa_ds.errors import UserError

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
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError("parquet: needs pyarrow; pip install 'mepa_ds[parquet]'")
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
        return files

    def _copy(self, files: list[Path], tables: list[Any], scratch: Path, names: tuple[str, ...]) -> None:
        """One tar of original bytes for each file; files that are copied already are not read again."""
        made_by = MadeBy(name="parquet", settings={"files": [f"{path.name} {path.stat().st_size}" for path in files]})
        shards = tuple(shard_name(number) for number in range(len(files)))
        writer = ShardWriter(scratch, Plan(kind="images", shard_names=shards, made_by=made_by))
        total = sum(table.metadata.num_rows for table in tables)
        with tqdm(total=total, desc="copying parquet", unit="row") as progress:
            for path, table, shard in zip(files, tables, shards, strict=True):
                if not writer.is_complete(shard):
                    writer.write_shard(shard, self._samples(path, table, len(names), progress))
                else:
                    progress.update(table.metadata.num_rows)
        writer.finish()

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
                number = label.as_py()
                if not isinstance(number, int) or number < 0 or (num_classes and number >= num_classes):
                    raise UserError(f"{where}: label {number} is out of range; is this a split without labels?")
                yield f"{path.stem.replace('.', '-')}-{row:09d}", {_kind(data): data, "cls": str(number).encode()}
                row += 1
                progress.update()


def _open(path: Path) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _batches(path: Path, table: Any, columns: list[str]) -> Iterator[Any]:
    from pyarrow import ArrowException

    try:
        yield from table.iter_batches(batch_size=64, columns=columns)
    except (ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read as parquet: {' '.join(str(error).split())}; download it again")


def _image_bytes(value: Any) -> bytes | None:
    """Bytes of a cell: empty for null, which is then a damaged image like others; None for what holds no bytes."""
    if isinstance(value, dict):  # a path alone says that the image is not embedded
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        return b""
    return value if isinstance(value, bytes) else None


def _kind(data: bytes) -> str:
    """File extension by the first bytes. What is no image is found when it is decoded."""
    if data[:4] == b"\x89PNG":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return "jpg" if data[:2] == b"\xff\xd8" else "tiff"


def _class_names(table: Any, column: str) -> tuple[str, ...]:
    """From the `datasets` library's note in the file; empty if there is none."""
    note = (table.schema_arrow.metadata or {}).get(b"huggingface")
    if note is None:
        return ()
    feature = json.loads(note).get("info", {}).get("features", {}).get(column, {})
    return tuple(feature.get("names", ()))
