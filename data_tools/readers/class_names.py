"""Names of all classes, for datasets that do not have images of every class."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mepa_ds.data.shards.index import ShardIndex
from mepa_ds.data_tools.readers.text_lines import read_lines
from mepa_ds.errors import UserError


def read_class_names(path: Path, option: str) -> tuple[str, ...]:
    """The names by label: of a shard set, or the lines of a text file.

    Raises:
        UserError: no such set or file; no names there, an empty one, or one twice.
    """
    if path.is_dir():
        names = ShardIndex.read(path, option).classes
    else:
        names = tuple(line.strip() for line in "\n".join(read_lines(path, option)).rstrip().splitlines())
    if not names:
        raise UserError(f"{option}: {path}: names no classes; give a text file with one a line")
    if "" in names:
        raise UserError(f"{option}: {path}: line {names.index('') + 1} is empty; lines stand for labels from 0 on")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{option}: {path}: {repeated[0]!r} is there more than once; names must be unique")
    return names
