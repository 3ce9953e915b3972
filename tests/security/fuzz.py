"""The child process of test_fuzz: reads changed files within bounds of memory and time, and prints what went wrong.

Called as `python -m tests.security.fuzz FOLDER SEED COUNT`.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import FrameType

MOST_MEMORY = 1 << 30
MOST_SECONDS = 20


class TooSlowError(BaseException):
    """No `except Exception` of a reader hides it."""


def _too_slow(signal_number: int, frame: FrameType | None) -> None:
    raise TooSlowError


def main(folder: Path, seed: int, count: int) -> None:
    from tests.security import mutations

    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - notes of readers
    if not folder.exists():
        mutations.make_samples(folder)
    for path, read in mutations.samples_in(folder):  # all that readers import is there before memory is bounded
        if (error := mutations.outcome(read, path)) is not None:
            print("WHOLE", path, repr(error), flush=True)
    faulthandler.enable(2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, used + MOST_MEMORY))
    signal.signal(signal.SIGPROF, _too_slow)
    for number, (path, read, whole, changed) in enumerate(mutations.cases(folder, seed, count)):
        path.write_bytes(changed)
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        started = time.process_time()
        try:
            error = mutations.outcome(read, path)
        except TooSlowError:
            error = TimeoutError(f"more than {MOST_SECONDS} s")
        signal.setitimer(signal.ITIMER_PROF, 0)
        path.write_bytes(whole)
        if error is not None:
            place = traceback.extract_tb(error.__traceback__)[-3:]
            shown = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(place))
            print(f"CASE {number} {path.parent.name}/{path.name} {error!r:.200} {shown}", flush=True)
        if time.process_time() - started > 5:
            print(f"slow {number} {path.name}: {time.process_time() - started:.1f} s", flush=True)
    print("done", count, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
