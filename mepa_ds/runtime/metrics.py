"""metrics.jsonl: one JSON object per line. It is the authoritative record of a run: reports, plots and fits read it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mepa_ds import log
from mepa_ds.errors import UserError
from mepa_ds.files import write_text
from mepa_ds.safety.places import open_to_append
from mepa_ds.safety.reading import bounded_lines, parse_line
from mepa_ds.safety.secrets import redacted_json

METRICS_NAME = "metrics.jsonl"
_MOST_STEP = 10**12


class MetricsWriter:
    """Appends records to `metrics.jsonl`, line by line, so a killed run keeps its records.

    A resumed run passes the step from which it continues. Records of later steps, which the killed run wrote after its
    last checkpoint, are dropped, so that every step is in the file once. None keeps all records. `anew` names an event
    of that step that will be written again, so its old record is dropped.

    A record that cannot be written (a full disk) is kept and tried again with the next record.
    """

    def __init__(self, path: Path, resume_step: int | None = 0, anew: str | None = None):
        kept = [r for r in read_metrics(path) if resume_step is None or r.get("step", 0) <= resume_step]
        if anew is not None:
            kept = [r for r in kept if (r.get("step", 0), r.get("event")) != (resume_step, anew)]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._path = path
        self._file = open_to_append(path)
        self._unwritten, self._failed = b"", False

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record, without secrets. Floats that JSON lacks (NaN, inf) become strings."""
        self._unwritten += json.dumps(finite(redacted_json(record))).encode() + b"\n"
        self._flush()

    def rewind(self, count: int, keep_warnings: bool) -> int:
        """Drops all records after the first `count`; returns how many are left.

        `keep_warnings` keeps later records that have a message. The file is truncated and not rewritten, because this
        needs no disk space. Records that have not been written yet count too.
        """
        stored = self._path.read_bytes()
        lines = (stored + self._unwritten).splitlines(keepends=True)
        kept = b"".join(lines[:count])
        warnings = [line for line in lines[count:] if keep_warnings and "message" in json.loads(line)]
        self._file.truncate(min(len(kept), len(stored)))
        self._unwritten = kept[len(stored) :] + b"".join(warnings)
        self._flush()
        return len(lines[:count]) + len(warnings)

    def _flush(self) -> None:
        try:
            while self._unwritten:
                written = self._file.write(self._unwritten)
                self._unwritten = self._unwritten[written or 0 :]
        except OSError as error:
            if not self._failed:
                log.note(f"warning: {self._path} cannot be written ({error}): records are kept and tried again")
            self._failed = True
        else:
            self._failed = False

    def close(self) -> None:
        self._flush()
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a run, without torn lines (from a kill or a lost node in the middle of a write)."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in bounded_lines(file):
            if (record := parse_record(line)) is not None:
                yield record


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None for one that no run writes: torn, nested without end, of a step that none has."""
    record = parse_line(line)
    if record is None:
        return None
    step = record.get("step", 0)
    is_usable = type(step) is int and 0 <= step <= _MOST_STEP and isinstance(record.get("event", ""), str)
    return record if is_usable else None


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """For readers of records that a run wrote. Raises UserError where their numbers are missing or no numbers: somebody
    else has written them."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path}: a record is not as a run of this version writes it ({type(error).__name__}: {str(error)[:200]}); "
            "take the line out, or start that run anew in another directory"
        ) from error


def finite(value: Any) -> Any:
    """Returns the value with strings in place of floats that JSON lacks (NaN, inf)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
