"""What every entry point shares: one clear message for a user's mistake, exit status 2, on every rank."""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
import threading
from collections.abc import Callable

import torch.distributed as dist

from mepa_ds import distributed
from mepa_ds.errors import UserError

_LEAVE_SECONDS = 30.0


def run(main: Callable[[], object]) -> None:
    """Runs `main`; a UserError is printed once and ends every rank with status 2."""
    try:
        main()
        _leave_together(0)
    except SystemExit as end:  # a deliberate end (help, "requeue me"), on every rank
        _leave_together(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except UserError as error:
        # Before the ranks meet all of them read the same command line; afterwards one may stand alone with its error.
        alone = dist.is_initialized() and not error.agreed
        if distributed.read_launch().is_main or alone:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        distributed.stop()


def _leave_together(status: int) -> None:
    """One of several ranks ends here, when all are done; a single process returns.

    What the run made is on disk, so nothing may keep a rank from ending then: the destructors of process groups and
    threads are left out (a rank that was the last to end was seen to abort in them, and once to hang). The wait for
    the others is the process group's, with its time-out: one rank may have minutes more to do.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
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
