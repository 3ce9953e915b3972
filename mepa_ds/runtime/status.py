"""status.json: the state of a run, for launchers that hide exit codes (torchrun) and for everybody who looks at it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from mepa_ds.files import write_json
from mepa_ds.safety.reading import read_json_object

STATUS_NAME = "status.json"
_MOST_BYTES = 1 << 20
RunStatus = Literal["running", "requeue", "finished", "failed", "diverged"]


def write_status(output_dir: Path, state: RunStatus, **facts: Any) -> None:
    """Writes the state of the run to `<output_dir>/status.json`."""
    write_json(output_dir / STATUS_NAME, {"state": state, **facts})


def read_status(output_dir: Path) -> dict[str, Any]:
    """Returns what a run says of itself: state, step, num_steps, seconds_left, error; {} where it says nothing."""
    with suppress(OSError, ValueError):
        return read_json_object(output_dir / STATUS_NAME, _MOST_BYTES)
    return {}
