"""Passes on that a long read or write makes progress.

Functions that read and write files call `note_progress` after every part. Code that waits for them listens with
`progress_noted_by`. A checkpoint's writer tells the other ranks, because their watchdogs would otherwise end them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[], object]
_listener: ContextVar[Listener] = ContextVar("listener", default=lambda: None)


def note_progress() -> None:
    """Tells the listener that this thread has made progress."""
    _listener.get()()


def current_listener() -> Listener:
    """Returns the listener, for work that is handed to another thread: threads do not inherit it."""
    return _listener.get()


@contextmanager
def progress_noted_by(listener: Listener) -> Iterator[None]:
    """Within the context, every `note_progress` in this thread calls `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
