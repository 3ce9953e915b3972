"""Members of a job array that are done. `python -m mepa_ds.slurm.in_job.parts STATE PARTS` fails and names the others.

Every member writes STATE/part-<number>/result: running, done, requeued: WHY, or failed: CAUSE.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mepa_ds import log
from mepa_ds.safety.places import open_no_link
from mepa_ds.safety.text import printable

RESULT = "result"
DONE = "done"
_SHOWN = 10
_MOST_BYTES = 4096


def results(state: Path, parts: int) -> dict[int, str]:
    """The result of every part; a part without a result file never started."""
    return {part: read_result(state / f"part-{part}") or "never started" for part in range(parts)}


def read_result(state: Path) -> str:
    """The result in a job's state directory; empty if the job has written none yet."""
    try:
        with open(open_no_link(state / RESULT, os.O_RDONLY), "rb") as file:
            return printable(file.read(_MOST_BYTES).decode(errors="replace").strip())
    except OSError:
        return ""


def open_parts(state: Path, parts: int) -> list[int]:
    """The parts that still have to run."""
    return [part for part, result in results(state, parts).items() if result != DONE]


def array_of(parts: list[int]) -> str:
    """SLURM's notation of a list of numbers: 0-3,7."""
    ranges: list[tuple[int, int]] = []
    for part in parts:
        if ranges and ranges[-1][1] == part - 1:
            ranges[-1] = (ranges[-1][0], part)
        else:
            ranges.append((part, part))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def main() -> None:
    state, parts = Path(sys.argv[1]), int(sys.argv[2])
    left = {part: result for part, result in results(state, parts).items() if result != DONE}
    if not left:
        log.say(f"{state}: all {parts} parts are done", flush=True)
        return
    for part, result in list(left.items())[:_SHOWN]:
        log.say(f"part {part}: {result}", flush=True)
    first, cause = next(iter(left.items()))
    log.say(
        f"error: {len(left)} of {parts} parts are not done: {array_of(list(left))} (part {first}: {cause}); "
        "their logs are in "
        f"{state}; the same `mepa slurm` command again starts only these",
        flush=True,
    )
    sys.exit(1)


if __name__ == "__main__":
    main()
