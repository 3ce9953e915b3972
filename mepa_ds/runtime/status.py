"""status.json: the state of a run, for launchers that hide exit codes (torchrun) and for everybody who looks at it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from mepa_ds.files import write_json
from mepa_ds.safety.secrets import redacted_json

STATUS_NAME = "status.json"
RunStatus = Literal["running", "requeue", "finished", "failed", "diverged"]


def write_status(output_dir: Path, state: RunStatus, **facts: Any) -> None:
    """Writes the state of the run to `<output_dir>/status.json`; what it says holds no secrets."""
    write_json(output_dir / STATUS_NAME, redacted_json({"state": state, **facts}))


def read_status(output_dir: Path) -> dict[str, Any]:
    """Returns what a run says of itself: state, step, num_steps, seconds_left, error; {} where it says nothing."""
    with suppress(OSError, ValueError):
        found = json.loads((output_dir / STATUS_NAME).read_text())
        return found if isinstance(found, dict) else {}
    return {}
