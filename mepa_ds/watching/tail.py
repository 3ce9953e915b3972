"""The end of a growing metrics.jsonl, read piece by piece: a long run's file is never read whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mepa_ds.files import check_regular
from mepa_ds.runtime.metrics import parse_record

# Enough for a line of losses even where each record has a large one of the routing beside it, which is left out.
_FIRST_BYTES = 4 << 20
_MOST_NEW_BYTES = 64 << 20
"""Between two looks; of what grows faster the end is read."""
_PROOF_BYTES = 256


class MetricsTail:
    """Reads new records at each call. A file that was cut (a rollback) or written anew (a resume) is read again."""

    def __init__(self, path: Path):
        self._path = path
        self._inode = self._offset = 0
        self._proof = b""
        """The last bytes before `_offset`."""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Returns the new records, and whether they replace all earlier ones.

        Records of the routing, lines that are not whole yet, and torn ones are left out. A file that is not there has
        no records.
        """
        try:
            check_regular(self._path)
            with open(self._path, "rb") as file:
                return self._read(file)
        except OSError:
            self._inode = self._offset = 0
            return [], True

    def _read(self, file: Any) -> tuple[list[dict[str, Any]], bool]:
        size, inode = os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_ino
        file.seek(max(self._offset - len(self._proof), 0))
        continues = (
            inode == self._inode
            and 0 <= size - self._offset <= _MOST_NEW_BYTES
            and file.read(len(self._proof)) == self._proof
        )
        if not continues:
            self._inode, self._offset = inode, max(size - _FIRST_BYTES, 0)
            file.seek(self._offset)
            if self._offset:
                self._offset += len(file.readline(_FIRST_BYTES))  # the rest of a line whose beginning is not read
        new = file.read(max(size - self._offset, 0))
        new = new[: new.rfind(b"\n") + 1]
        self._offset += len(new)
        file.seek(max(self._offset - _PROOF_BYTES, 0))
        self._proof = file.read(min(_PROOF_BYTES, self._offset))
        return [record for line in new.splitlines() if (record := _record(line)) is not None], not continues


def _record(line: bytes) -> dict[str, Any] | None:
    if b'"event": "routing"' in line[:64]:  # large
        return None
    return parse_record(line)
