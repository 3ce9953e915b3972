"""metrics.jsonl: one JSON object a line, the truth of a run (D8). Plots, reports and fits read it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mepa_ds.files import write_text


class MetricsWriter:
    """Appends records to `metrics.jsonl`, flushed line by line, so a killed run keeps what it logged.

    A resumed run passes the step it continues from: records of later steps, which the killed run wrote after its
    last checkpoint, are dropped, so that every step stands in the file once.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        kept = [record for record in read_metrics(path) if record.get("step", 0) <= resume_step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(path, "a")  # noqa: SIM115 - lives as long as the run

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record. Floats that JSON lacks (NaN, inf) become strings."""
        self._file.write(json.dumps(_finite(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a run; a torn last line (a kill in the middle of a write) is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
