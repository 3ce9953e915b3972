"""Resident memory of this process, as the kernel accounts for it."""

from __future__ import annotations

import re
import resource
from pathlib import Path


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
