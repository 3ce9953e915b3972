"""How far a command is: a bar in a terminal, and a plain line now and then in a log file or a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from mepa_ds import log
from mepa_ds.safety.text import printable

# In a file: a first line after so many seconds, and so many seconds between lines. Quick commands write none.
_FIRST_SECONDS, _LINE_SECONDS = 10.0, 30.0


class Progress(tqdm):  # type: ignore[type-arg]  # at run time it has no arguments
    """A bar of tqdm. Where stderr is no terminal it writes whole lines, without the characters that move a cursor.

    The options are tqdm's; `disable` is for ranks that say nothing.
    """

    def __init__(self, iterable: Iterable[Any] | None = None, desc: str | None = None, *words: Any, **options: Any):
        self._writes_lines = not sys.stderr.isatty()
        self._line_due = time.monotonic() + _FIRST_SECONDS
        if self._writes_lines:
            options |= {"disable": bool(options.get("disable")), "leave": False, "ncols": 0, "delay": 0}
        super().__init__(iterable, None if desc is None else printable(desc), *words, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # type: ignore[override]
        """Draws the bar, or writes a line if one is due. tqdm calls this for everything that it shows."""
        if not self._writes_lines:
            return bool(super().display(msg, pos))  # type: ignore[func-returns-value]
        if msg is None and time.monotonic() >= self._line_due:
            self._line_due = time.monotonic() + _LINE_SECONDS
            log.note(str(self).strip())
        return False

    def clear(self, *arguments: Any, **options: Any) -> None:
        """Takes the bar away, where there is one."""
        if not self._writes_lines:
            super().clear(*arguments, **options)

    def moveto(self, n: int) -> None:
        """Moves the cursor, where there is one."""
        if not self._writes_lines:
            super().moveto(n)
