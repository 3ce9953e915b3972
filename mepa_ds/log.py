"""A command's output. A log that cannot be written (a full disk, a reader that has gone or waits) ends no run."""

from __future__ import annotations

import io
import os
import re
import select
import stat
import sys
from contextlib import suppress
from typing import Any

from mepa_ds.safety.secrets import redacted
from mepa_ds.safety.text import message, printable_lines

STDOUT = "stdout"
"""As errors of writing there name it."""
# How long a reader may leave a pipe full before a log goes on without it.
_PATIENCE_SECONDS = 10.0
_FORGED = re.compile(r"(?i)\n((?:error|warning)\b)")


class _Stream(io.FileIO):
    """The file of stdout or stderr. `is_log`: what cannot be written is lost; else that is an OSError with a name."""

    def __init__(self, descriptor: int, name: str, is_log: bool):
        super().__init__(descriptor, "wb", closefd=False)
        self.is_log, self._name, self._lost, self._stalled = is_log, name, False, False
        kind = os.fstat(descriptor).st_mode
        self._is_pipe = stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)  # a terminal waits for its user

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                left = left[self._write_some(left) :]
        except OSError as error:
            if not self.is_log and not self._lost:
                self._lost = True  # the interpreter tries again at its end
                raise type(error)(error.errno, error.strerror, self._name) from error
            self._tell(error.strerror or str(error))
        return size

    def _write_some(self, data: memoryview) -> int:
        """Of a pipe so much at a time as it takes at once when it has room. A parent may have made it non-blocking."""
        ready = select.poll()
        ready.register(self.fileno(), select.POLLOUT)
        patience = 0.0 if self._stalled else _PATIENCE_SECONDS
        if not ready.poll(1000 * patience if self.is_log and self._is_pipe else None):
            self._stalled = True
            raise TimeoutError(f"its reader has read nothing for {_PATIENCE_SECONDS:g} s")
        self._stalled = False
        return super().write(data[: select.PIPE_BUF] if self._is_pipe else data) or 0

    def _tell(self, reason: str) -> None:
        if not self._lost and self._name == STDOUT:
            note(f"warning: stdout cannot be written ({reason}): lines are lost, and the work goes on")
        self._lost = True


def open_streams() -> None:
    """To be called once, by a program: stdin, stdout and stderr are there, and take every character.

    A parent may have closed them (`>&-`, some schedulers): Python has None then, and the next file that is opened gets
    their number. stderr is a log; stdout is what the command is for, until `make_stdout_a_log`.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            lowest = os.open(os.devnull, os.O_RDWR)  # that is free: this one
            os.set_inheritable(lowest, True)
    sys.stdout = _opened(sys.stdout, 1, is_log=False)
    sys.stderr = _opened(sys.stderr, 2, is_log=True)


def _opened(stream: Any, descriptor: int, is_log: bool) -> Any:
    if stream is None:  # its number may be another file's by now
        return open(os.devnull, "w")
    if not isinstance(stream, io.TextIOWrapper) or _number_of(stream) != descriptor:
        return stream  # of a program that calls this one
    with suppress(OSError):
        stream.flush()
    raw = _Stream(descriptor, stream.name.strip("<>"), is_log)
    unbuffered = isinstance(stream.buffer, io.RawIOBase)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),  # type: ignore[arg-type]
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _number_of(stream: io.TextIOWrapper) -> int | None:
    try:
        return stream.fileno()
    except OSError:  # a test's, in memory
        return None


def make_stdout_a_log() -> None:
    """For commands that leave files: from here on what is printed is but a log of that, and may be lost."""
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if isinstance(raw, _Stream):
        raw.is_log = True


def note(line: str) -> None:
    """A line on stderr, from any rank: printable, and without secrets (mepa_ds.safety.text)."""
    with suppress(OSError):
        print(message(line), file=sys.stderr, flush=True)


def shown(text: str) -> str:
    """A text for stdout or above a bar: printable, and without secrets. No line of it but the first begins as an error
    or a warning does, so that a line break in a name out of a file forges none."""
    return _FORGED.sub(r"\n  \1", printable_lines(redacted(text)))


def say(*parts: object, sep: str = " ", end: str = "\n", flush: bool = False, to_stderr: bool = False) -> None:
    """`print` of what is `shown`: for what a command is for."""
    print(shown(sep.join(map(str, parts))), end=end, flush=flush, file=sys.stderr if to_stderr else sys.stdout)


def answer(text: str) -> None:
    """Writes to stdout, as it is, what a shell or another program reads there."""
    print(text, flush=True)
