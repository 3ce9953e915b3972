"""Signals that ask a command to end (Ctrl-C among them), and the command that goes on.

No library beside Python's own: a command imports this first, so that an interrupt amid its imports is no traceback.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mepa_ds import log

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed", "deepspeed.launcher.launch")


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def handled() -> tuple[signal.Signals, ...]:
    """`SIGNALS`, but for SIGHUP where nohup has this process ignore it."""
    return tuple(n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)


def same_request_seconds() -> float:
    """Within so many seconds two signals are one request.

    Launchers pass a signal on to ranks that have it from the terminal or the batch system already; without one, only
    tools such as timeout(1) send it twice.
    """
    return 1.0 if "RANK" in os.environ or "SLURM_PROCID" in os.environ else 0.1


def raise_interrupts() -> None:
    """SIGINT, SIGTERM and SIGHUP raise `Interrupted` in the main thread from now on; a second one ends the process.

    Amid an import, where nothing is to be put in order and an exception can get lost, the first one ends it.
    SIGUSR1 is for those that save on request (`runtime.stopping`): it ends all others, as ever.
    """
    first: float | None = None
    # Known before: a signal that comes amid this function is handled within it, and many at once would go too deep.
    window, clock = same_request_seconds(), time.monotonic

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = clock()
        if first is None:
            first = now
            if not _is_importing(frame):
                raise Interrupted(number)
            tell(number)
            os._exit(128 + number)
        if now - first > window:
            os._exit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in set(handled()) - {signal.SIGUSR1}:
            signal.signal(number, interrupt)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def tell(number: int) -> None:
    """A line, of the first rank alone: a signal has ended this command, and how to go on."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        name = signal.Signals(number).name
        log.note(f"stopped ({name}); what is complete is kept. To go on, start again{to_go_on()}")


@contextmanager
def blocked() -> Iterator[None]:
    """The signals wait meanwhile; processes and threads that are started meanwhile are born with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_only(parent: int) -> None:
    """For a worker process: signals that a terminal or a batch system sends to all processes are its parent's to obey.

    They are blocked, not ignored: a parent that ends stops its workers by SIGTERM, and waits for them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        pass
    os._exit(0)


def command_line() -> str:
    """What starts this program again, as a shell takes it, with its launcher's options as far as they can be seen.

    Empty within a SLURM job, which its scripts start again.
    """
    if "SLURM_JOB_ID" in os.environ:
        return ""
    words, pid = list(sys.orig_argv), os.getppid()
    while (above := _words_of(pid)) and any(Path(word).name in _LAUNCHERS for word in above[:4]):
        words, pid = above, _parent_of(pid)
    script = shutil.which(Path(words[1]).name) if len(words) > 1 else None
    if script is not None and script == words[1]:  # a console script, found on the PATH
        words = [Path(script).name, *words[2:]]
    elif shutil.which(Path(words[0]).name) == words[0]:
        words[0] = Path(words[0]).name
    return shlex.join(words)


def to_go_on() -> str:
    """The end of a line that tells of a stop: `command_line` after a colon and on a line of its own."""
    command = command_line()
    return f":\n  {command}" if command else ""


def _words_of(pid: int) -> list[str]:
    try:
        return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
    except OSError:
        return []


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0
