"""What a tracker is, and how one that fails is told of: by one warning, since metrics.jsonl has all numbers."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from mepa_ds import log

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Tracker(Protocol):
    """Shows numbers of a run somewhere else. No method raises, whatever happens to the tracker."""

    def add(self, scalars: dict[str, float], step: int) -> None:
        """Shows numbers of a step."""

    def add_picture(self, name: str, pixels_HW3: Pixels, step: int) -> None:
        """Shows a picture of a step."""

    def rewind(self, step: int) -> None:
        """Goes back to a step: those after it come again."""

    def close(self) -> None:
        """Ends the run, after what was added is shown."""


def rests(what: str) -> None:
    """The warning that a tracker shows nothing from here on."""
    log.note(f"warning: {what}; metrics.jsonl has all numbers")


def in_a_line(error: BaseException) -> str:
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:300]
