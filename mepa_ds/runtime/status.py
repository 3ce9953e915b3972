"""status.json: the state of a run, for launchers that hide exit codes (torchrun) and for everybody who looks at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from mepa_ds.files import write_json
from mepa_ds.safety.reading import read_json_object
from mepa_ds.safety.secrets import redacted_json

STATUS_NAME = "status.json"
_KINDS: dict[str, type | tuple[type, ...]] = {
    "state": str, "error": str, "step": int, "num_steps": int, "loss": (int, float, str),
    "seconds_left": (int, float, str), "images_per_second": (int, float, str),
}  # fmt: skip
_MOST_BYTES = 1 << 20
RunStatus = Literal["running", "requeue", "finished", "failed", "diverged"]


def write_status(output_dir: Path, state: RunStatus, **facts: Any) -> None:
    """Writes the state of the run to `<output_dir>/status.json`; what it says holds no secrets."""
    write_json(output_dir / STATUS_NAME, redacted_json({"state": state, **facts}))


def read_status(output_dir: Path) -> dict[str, Any]:
    """Returns what a run says of itself: state, step, num_steps, seconds_left, error; {} where it says nothing.

    What of it is no number or no text, but should be, is left out.
    """
    try:
        found = read_json_object(output_dir / STATUS_NAME, _MOST_BYTES)
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, _KINDS.get(key, object))}
