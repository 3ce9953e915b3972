"""The frame of every entry point: one clear message for a user's mistake, and exit status 2 on every rank.

PyTorch is imported only when a command runs, so that an interrupt during that import is one line too.
"""

from __future__ import annotations

import atexit
import errno
import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from types import TracebackType
from typing import NoReturn

from mepa_ds import log
from mepa_ds.errors import UserError
from mepa_ds.interrupts import Interrupted, raise_interrupts, tell

_LEAVE_SECONDS = 30.0
_MAKE_ROOM = "free some space there and run again"
_ELSEWHERE = "give another path, or get the right to write there"
_OF_THE_SYSTEM = {errno.ENOSPC: _MAKE_ROOM, errno.EDQUOT: _MAKE_ROOM} | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG), _ELSEWHERE
)
"""What to do about errors of a place (a full disk, a lack of rights), which are no bugs of this program."""


def run(main: Callable[[], object], reads_options: bool = True) -> None:
    """Runs `main`; a UserError is printed once and ends every rank with status 2.

    `reads_options` is for a `main` that parses its options by their types; without, it starts a moment earlier.

    A signal that asks a command to end (Ctrl-C) gives one line and the status 128 + its number; a second signal ends
    the command at once. A command whose output nobody reads any more (`| head`) ends silently, with SIGPIPE's status.
    """
    log.open_streams()
    sys.excepthook = _show_crash
    try:
        raise_interrupts()
        from mepa_ds.machine import limit_threads

        limit_threads()
        with _types_of_options() if reads_options else nullcontext():
            _run(main)
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        tell(number)
        sys.exit(128 + number)
    except BrokenPipeError as error:  # network connections raise it too
        if error.filename != log.STDOUT:
            raise
        sys.exit(128 + signal.SIGPIPE)
    finally:
        if "torch.distributed" in sys.modules:
            from mepa_ds import distributed

            distributed.stop()


def _show_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A bug of ours, as Python shows it, but printable and without secrets: what it says may come from a file."""
    with suppress(OSError):
        log.say("".join(traceback.format_exception(kind, error, trace)), end="", to_stderr=True)


def _types_of_options() -> AbstractContextManager[object]:
    from mepa_ds.command_line.paths import REGISTRY

    return REGISTRY


def _run(main: Callable[[], object]) -> None:
    try:
        main()
        _leave_together(0)
    except SystemExit as end:  # a deliberate end (help, "requeue me"), on every rank
        _leave_together(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except UserError as error:
        _end(error)
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _end(UserError(f"{where}{error.strerror}; {_OF_THE_SYSTEM[error.errno]}"))


def _end(error: UserError) -> NoReturn:
    import torch.distributed as dist

    from mepa_ds import distributed

    # Before the ranks have met, all read the same command line, but one node may lack a file: one rank of each node
    # prints. Afterwards a rank whose error is not shared by all prints it as well.
    met, launch = dist.is_initialized(), distributed.read_launch()
    if launch.is_main or (not error.agreed if met else launch.local_rank == 0):
        log.note(f"error: {error}")
    sys.exit(2)


def _leave_together(status: int) -> None:
    """Ends the process once all ranks are done, if there are several; a single process returns.

    Everything is on disk by then, so nothing may keep a rank from ending: the destructors of process groups and threads
    are left out (a rank that was the last to end was seen to abort in them, and once to hang). The barrier has the
    process group's time-out, since one rank may have work for minutes more. See docs/decisions.md, Leaving without
    destructors.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized() or dist.get_world_size() == 1:
        sys.stdout.flush()  # so that a broken pipe is noticed here, and not when the interpreter ends
        return
    dist.barrier()  # no rank leaves while another still needs it; a launcher ends the others when the first one exits
    guard = threading.Timer(_LEAVE_SECONDS, _leave_anyway, (status,))
    guard.daemon = True
    guard.start()
    atexit._run_exitfuncs()
    _exit(status)


def _leave_anyway(status: int) -> None:
    from mepa_ds import distributed

    log.note(f"rank {distributed.rank()}: does not end; stacks of all threads:")
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    _exit(status)


def _exit(status: int) -> None:
    with suppress(OSError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
