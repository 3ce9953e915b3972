"""The line of a log that says why a job failed: `python -m mepa_ds.slurm.in_job.cause LOG [BYTES]`."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from mepa_ds import log
from mepa_ds.runtime.lost_peers import is_lost_peer
from mepa_ds.safety.places import open_regular
from mepa_ds.safety.text import message

_MOST_BYTES = 1 << 25  # of either end of a log
_SUMMARY = "ChildFailedError"  # torchrun's last line, whatever has failed
_RANK = re.compile(r"^(?:\[rank\d+\]: ?|\[\w+\d*\]: ?|\d+: )+")
# A message of ours, of argparse or of tyro; the last line of a traceback; SLURM's message about a killed process; or
# the last line of a process that had no time for a traceback (NCCL's watchdog, C++, the interpreter).
_CAUSE = re.compile(
    r"^(?:error: (?P<ours>.+)"
    r"|(?!srun|slurm)[\w./ -]+: error: (?P<usage>.+)"
    r"|│ (?P<options>(?:Missing from|Unrecognized|Error|Parsing).*?) *│?$"
    r"|(?P<raised>(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)(?:: .*)?$)"
    r"|.*(?P<watchdog>Watchdog caught .+)"
    r"|\s*what\(\): +(?P<what>.+)"
    r"|(?P<fatal>Fatal Python error: .+)"
    r"|(?P<slurm>(?:slurmstepd|srun): error: .*(?:oom|out of memory|memory limit|[Nn]ode failure).*))",
)


def cause_of(text: str) -> str | None:
    """The first error message in a log; later ones come from ranks that the first one took down. None: there is none.

    A rank that was taken down may write its message before the rank that failed first. A message about a lost peer
    therefore counts only if there is no other. This project's own messages (`error: ...`) count as they are.
    """
    weak: str | None = None
    for line in text.splitlines():
        found = _CAUSE.match(_RANK.sub("", line))
        if found:
            cause = next(text for text in found.groups() if text)
            if found["ours"] or not (is_lost_peer(cause) or _SUMMARY in cause):
                return cause
            weak = weak or cause
    return weak


def main() -> None:
    path, start = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    text = read_log(path, start)
    cause = None if text is None else cause_of(text)
    if cause is None:
        sys.exit(1)
    log.say(message(cause))


def read_log(path: Path, start: int = 0) -> str | None:
    """The text of a log from byte `start` on, without its middle if it is very long; None where no file is."""
    with suppress(OSError), open(open_regular(path), "rb") as file:
        file.seek(start)
        text = file.read(_MOST_BYTES)
        file.seek(max(os.fstat(file.fileno()).st_size - _MOST_BYTES, file.tell()))
        return (text + file.read(_MOST_BYTES)).decode(errors="replace")
    return None


if __name__ == "__main__":
    main()
