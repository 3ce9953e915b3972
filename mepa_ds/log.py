"""Lines for a run's log. A log that cannot be written (a full disk, a reader that has gone) ends no run."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def note(line: str) -> None:
    """A line on stderr, from any rank."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def settle() -> None:
    """At the end of a run, whose status says how it ended: what stdout cannot be rid of changes nothing about it."""
    try:
        sys.stdout.flush()
    except OSError:
        discard_stdout()


def discard_stdout() -> None:
    """What is still to be written goes nowhere, so that the interpreter's own attempt at its end is no error."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, sys.stdout.fileno())
    os.close(sink)
