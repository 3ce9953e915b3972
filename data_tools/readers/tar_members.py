"""Images in uncompressed tars: named, labelled, and read by offset. Several readers give this source."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mepa_ds.data.shards.samples import MOST_MEMBER_BYTES
from mepa_ds.errors import DamagedError
from mepa_ds.files import again, why_unreadable
from mepa_ds.safety.text import printable


@dataclass
class TarMembers:
    """A source whose images are members of tars."""

    name: str
    classes: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)
    _members: list[tuple[int, int, int]] = field(default_factory=list)
    """(number of the path, offset, size)."""
    _names: list[str] = field(default_factory=list)
    _labels: list[int] = field(default_factory=list)

    def add(self, path: int, name: str, offset: int, size: int, label: int) -> None:
        self._members.append((path, offset, size))
        self._names.append(printable(name))
        self._labels.append(label)

    def __len__(self) -> int:
        return len(self._members)

    def label(self, number: int) -> int:
        return self._labels[number]

    def describe(self, number: int) -> str:
        return f"{self.paths[self._members[number][0]].name}: {self._names[number]}"

    def load(self, number: int) -> tuple[str, bytes]:
        path, offset, size = self._members[number]
        if size > MOST_MEMBER_BYTES:
            raise DamagedError(f"{self.describe(number)}: has {size} bytes; at most {MOST_MEMBER_BYTES} are read")
        try:
            data = again(lambda: _read(self.paths[path], offset, size))
        except OSError as error:
            reason = why_unreadable(self.paths[path], error)
            raise DamagedError(f"{self.describe(number)}: cannot be read: {reason}") from error
        if len(data) != size:
            raise DamagedError(f"{self.describe(number)}: the tar ends inside it; copy it again")
        return self._names[number].rpartition(".")[2].lower(), data


def _read(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
