"""One place to say that a long read or write goes on, and one to hear it.

Functions that read and write files call `note_progress` after every part. Whoever waits for them listens with
`progress_noted_by`: a checkpoint's writer tells the other ranks, whose watchdogs would end them otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[], object]
_listener: ContextVar[Listener] = ContextVar("listener", default=lambda: None)


def note_progress() -> None:
    """Something was done in this thread."""
    _listener.get()()


def current_listener() -> Listener:
    """For work that is handed to another thread, which does not inherit the listener."""
    return _listener.get()


@contextmanager
def progress_noted_by(listener: Listener) -> Iterator[None]:
    """Within the context, and in this thread, `listener` is called at every `note_progress`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
