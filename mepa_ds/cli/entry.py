"""What every entry point shares: one clear message for a user's mistake, exit status 2, on every rank."""

from __future__ import annotations

import atexit
import errno
import faulthandler
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from mepa_ds import distributed, log
from mepa_ds.cpus import limit_threads
from mepa_ds.errors import UserError

_LEAVE_SECONDS = 30.0
_MAKE_ROOM = "free some space there and run again"
_ELSEWHERE = "give another path, or yourself the right to write there"
_OF_THE_SYSTEM = {errno.ENOSPC: _MAKE_ROOM, errno.EDQUOT: _MAKE_ROOM} | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG), _ELSEWHERE
)
"""Errors that a place has, not this program: what to do about them."""


def run(main: Callable[[], object]) -> None:
    """Runs `main`; a UserError is printed once and ends every rank with status 2.

    When nobody reads its output any more (`| head`) a command ends as SIGPIPE ends others: without a word.
    """
    try:
        limit_threads()
        _run(main)
    except BrokenPipeError:  # a network's connections raise it too
        if not _reader_has_gone():
            raise
        log.discard_stdout()
        sys.exit(128 + signal.SIGPIPE)
    finally:
        distributed.stop()


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
    except KeyboardInterrupt:
        sys.exit(130)


def _end(error: UserError) -> NoReturn:
    # Before the ranks meet each reads the same command line, but a node may lack a file: one rank a node speaks.
    # Afterwards one may stand alone with its error.
    met, launch = dist.is_initialized(), distributed.read_launch()
    if launch.is_main or (not error.agreed if met else launch.local_rank == 0):
        log.note(f"error: {error}")
    sys.exit(2)


def _reader_has_gone() -> bool:
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in watch.poll(0))


def _leave_together(status: int) -> None:
    """One of several ranks ends here, when all are done; a single process returns.

    What the run made is on disk, so nothing may keep a rank from ending then: the destructors of process groups and
    threads are left out (a rank that was the last to end was seen to abort in them, and once to hang). The wait for
    the others is the process group's, with its time-out: one rank may have minutes more to do.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        sys.stdout.flush()  # a reader that has gone is met here, not where the interpreter ends
        return
    dist.barrier()  # no rank leaves while another still needs it; a launcher ends the others when the first one exits
    guard = threading.Timer(_LEAVE_SECONDS, _leave_anyway, (status,))
    guard.daemon = True
    guard.start()
    atexit._run_exitfuncs()
    _exit(status)


def _leave_anyway(status: int) -> None:
    print(f"rank {distributed.rank()}: does not end; stacks of all threads:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    _exit(status)


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
