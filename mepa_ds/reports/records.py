"""A run's metrics.jsonl read once: training records as columns, other events as they are, routing when asked for.

A long run has gigabytes of routing records and a page shows a few of them; the others are never parsed.

Shapes: N training records.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mepa_ds.config.base import read_yaml
from mepa_ds.errors import UserError
from mepa_ds.progress import Progress
from mepa_ds.runtime.metrics import METRICS_NAME, parse_record
from mepa_ds.runtime.status import read_status
from mepa_ds.safety.reading import MOST_LINE_BYTES, bounded_lines

RunKind = Literal["pretraining", "tokenizer"]
Column = NDArray[np.float64]
_ROUTING = b'{"event": "routing"'
_SHOWN_LINES = 5
_MOST_EVENTS = 200_000
"""Of records that are neither of training nor routing, and of routing: a run of a million steps has some thousands."""
_MOST_COLUMNS, _MOST_NUMBERS = 4096, 50_000_000
"""Of training records: 400 MB."""
_LINES_A_LOOK, _PATIENCE_SECONDS = 200, 2.0


@dataclass
class RunRecords:
    """The records of one run.

    Attributes:
        directory: the run's output_dir.
        train: (N,) of each number of the training records by name, in the order of steps; lists are `name/1`,
            `name/2`, ...; NaN where a record has no such number or one that is not finite.
        events: all records that are neither of training nor of routing, in their order.
        routing: places of the routing records in the file, in their order.
        notes: sentences on what is not as it should be in the file.
    """

    directory: Path
    kind: RunKind
    train: dict[str, Column]
    events: list[dict[str, Any]]
    routing: list[int]
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> Column:
        return self.train["step"]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.events if record["event"] == event]

    def last(self, name: str) -> float | None:
        """Returns the number of the last training record; None without such a number."""
        values = self.train.get(name)
        return None if values is None or np.isnan(values[-1]) else float(values[-1])

    def routing_records(self, places: Iterable[int]) -> list[dict[str, Any]]:
        """Parses the routing records at these places (a part of `routing`)."""
        found = []
        with open(self.directory / METRICS_NAME, "rb") as file:
            for place in places:
                file.seek(place)
                record = _parsed(file.readline(MOST_LINE_BYTES))
                if record is not None and isinstance(record.get("layers"), dict) and record["layers"]:
                    found.append(record)
        return found

    def recipe(self) -> dict[str, Any]:
        """Returns resolved.yaml; {} where it is not there or cannot be read, which `notes` then say."""
        path = self.directory / "resolved.yaml"
        try:
            return read_yaml(path)
        except UserError as error:
            note = f"{error}; so the page has no recipe of this run"
            if note not in self.notes:
                self.notes.append(note)
            return {}


def read_records(directory: Path) -> RunRecords:
    """Reads a run of either kind.

    Raises:
        UserError: the directory has no run, or the run has not logged a training record.
    """
    path = directory / METRICS_NAME
    if not path.is_file():
        raise UserError(f"{path}: no training is recorded there; give the output_dir of a pretraining or tokenizer run")
    columns, events, routing, lost = _Columns(), list[dict[str, Any]](), list[int](), _Lost()
    try:
        for number, place, line in _lines(path):
            record = None if (is_routing := line.startswith(_ROUTING)) else _parsed(line)
            if is_routing or (record is not None and record["event"] == "routing"):  # other hands leave other spaces
                if len(routing) < _MOST_EVENTS:
                    routing.append(place)
                else:
                    lost.too_many += 1
            elif record is None:
                lost.add(number)
            elif record["event"] == "train":
                columns.add(record)
            elif len(events) < _MOST_EVENTS:
                events.append(record)
            else:
                lost.too_many += 1
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not columns.count:
        raise UserError(f"{path}: no training is recorded there yet{_why_not(directory, events)}")
    notes = lost.notes(number)
    if columns.left_out:
        notes.append(f"{columns.left_out} numbers of training records are more than a page can show: left out")
    train, unordered = columns.in_order()
    if unordered:
        notes.append(f"{unordered} training records stand behind later ones; the last record of each step counts")
    kind: RunKind = "tokenizer" if "codebook_use" in train else "pretraining"
    return RunRecords(directory, kind, train, events, routing, notes)


def number_of(value: Any) -> float | None:
    """Returns a number of a record as a float; what JSON lacks stands there as "nan", "inf". None for anything else."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    return None


def flat_numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields the numbers of a record and of its lists by name."""
    for key, value in record.items():
        if type(value) is float or type(value) is int:
            yield key, value
        elif isinstance(value, list):
            for index, item in enumerate(value, start=1):
                if (number := number_of(item)) is not None:
                    yield f"{key}/{index}", number
        elif (number := number_of(value)) is not None:
            yield key, number


class _Lost:
    """Lines that are not used: the first ones by number, all by count."""

    def __init__(self) -> None:
        self.count, self.too_many = 0, 0
        self._first: list[int] = []

    def add(self, number: int) -> None:
        self.count += 1
        if len(self._first) <= _SHOWN_LINES:
            self._first.append(number)

    def notes(self, last: int) -> list[str]:
        """`last`: the number of the file's last line."""
        notes = []
        if self.count == 1 and self._first == [last]:
            notes.append(
                f"the last line of {METRICS_NAME} is cut short (the run was killed, or is writing now): it is left out"
            )
        elif self.count:
            shown = ", ".join(map(str, self._first[:_SHOWN_LINES])) + (", ..." if self.count > _SHOWN_LINES else "")
            lines = "1 line" if self.count == 1 else f"{self.count} lines"
            notes.append(f"{lines} of {METRICS_NAME} (number {shown}) hold no record: left out")
        if self.too_many:
            notes.append(f"{self.too_many} records of {METRICS_NAME} come after the first {_MOST_EVENTS}: left out")
        return notes


class _Columns:
    """Rows that have the same names mostly become columns: a record of a long run costs its numbers alone.

    `left_out`: how many numbers would have made them too large, by names that only some records have.
    """

    def __init__(self) -> None:
        self.count = self.left_out = 0
        self._columns: dict[str, array[float]] = {}

    def add(self, record: dict[str, Any]) -> None:
        ranks = record.pop("ranks", None)
        if isinstance(ranks, dict) and isinstance(own := ranks.get("own_seconds"), dict):
            record["own_seconds_fastest"], record["own_seconds_slowest"] = own.get("min"), own.get("max")
        columns = self._columns
        if len(columns) * self.count > _MOST_NUMBERS:
            self.left_out += len(record)
            return
        for name, value in flat_numbers(record):
            column = columns.get(name)
            if column is None:
                if (len(columns) + 1) * self.count > _MOST_NUMBERS or len(columns) >= _MOST_COLUMNS:
                    self.left_out += 1
                    continue
                column = columns[name] = array("d")
            if len(column) < self.count:
                column.extend([np.nan] * (self.count - len(column)))
            column.append(value)
        self.count += 1

    def in_order(self) -> tuple[dict[str, Column], int]:
        """Returns the columns by rising step, and how many records had to be left out for that."""
        columns = {}
        for name, column in self._columns.items():
            values = np.full(self.count, np.nan)
            values[: len(column)] = column
            columns[name] = values
        steps = columns["step"]
        if self.count < 2 or (np.diff(steps) > 0).all():
            return columns, 0
        _, from_the_end = np.unique(steps[::-1], return_index=True)
        kept = self.count - 1 - from_the_end
        return {name: values[kept] for name, values in columns.items()}, int((np.diff(steps) <= 0).sum())


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yields each line with its number from 1 and its place. Shows progress if that takes more than a moment."""
    place, size = 0, path.stat().st_size
    with (
        open(path, "rb") as file,
        Progress(
            total=size, desc=str(path), unit="B", unit_scale=True, delay=_PATIENCE_SECONDS, leave=False
        ) as progress,
    ):
        for number, line in enumerate(bounded_lines(file), start=1):
            yield number, place, line
            place += len(line)
            if number % _LINES_A_LOOK == 0:
                progress.update(place - progress.n)


def _parsed(line: bytes) -> dict[str, Any] | None:
    record = parse_record(line)
    return record if record is not None and "event" in record and "step" in record else None


def _why_not(directory: Path, events: list[dict[str, Any]]) -> str:
    if not events:
        return "; the run has not begun its steps, or its log was lost"
    status = read_status(directory)
    state = (
        f"; {status['state']}" + (f": {status['error']}" if status.get("error") else "") if "state" in status else ""
    )
    return f": the run has started, and its first record comes after log.every steps{state}"
