"""Ends a process that makes no progress any more, and shows the stacks of its threads."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from mepa_ds import distributed, log
from mepa_ds.safety.places import open_anew

# The exit code of timeout(1): the run made no progress for guards.hang_timeout seconds.
HANG_EXIT_CODE = 124


class Watchdog:
    """Ends a process without progress for `timeout` seconds: writes all stacks to stderr and a file, exits with 124."""

    def __init__(self, timeout: float | None, directory: Path):
        self._timeout, self._directory = timeout, directory
        self._beat = time.monotonic()
        self._stopped = threading.Event()
        if timeout is not None:
            threading.Thread(target=self._watch, args=(timeout,), name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Notes that the process has made progress."""
        self._beat = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self, timeout: float) -> None:
        while not self._stopped.wait(min(1.0, timeout / 4)):
            if time.monotonic() - self._beat <= timeout:
                continue
            rank = distributed.rank()
            log.note(
                f"error: rank {rank}: no step for {timeout:g} seconds (guards.hang_timeout); stacks of all threads:"
            )
            try:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                self._directory.mkdir(parents=True, exist_ok=True)
                path = self._directory / f"hang_rank_{rank:05d}.txt"
                with open_anew(path) as file:
                    faulthandler.dump_traceback(file=file, all_threads=True)
            finally:
                os._exit(HANG_EXIT_CODE)
