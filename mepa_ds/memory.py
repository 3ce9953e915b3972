"""Resident memory of this process, as the kernel accounts for it, and what the C library keeps of it."""

from __future__ import annotations

import ctypes
import re
import resource
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """For processes that compute on a CPU: what a step frees is kept for the next one.

    The C library maps large blocks one by one and gives them back at once; the kernel then clears every page of every
    gradient and activation again in each step. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def resident_bytes() -> int:
    """What is in memory now."""
    return _status_bytes("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most that this program had in memory so far.

    Not `ru_maxrss`: that survives exec, so a process that a large one has started begins with the large one's peak.
    It stands in only where /proc does not say.
    """
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status_bytes(key: str) -> int:
    """A size of /proc/self/status; 0 where there is none."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
