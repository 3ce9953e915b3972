"""`mepa doctor`: what is installed, what the machine has, what is wrong with it, and what to do."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mepa_ds import log
from mepa_ds.command_line import entry

if TYPE_CHECKING:
    from mepa_ds.doctor.finding import Finding


@dataclass
class DoctorOptions:
    """Looks at versions, CPUs, memory, GPUs, compilers, disks, runs, SLURM, and at shard sets and weights that are
    named. Each finding is ok, a note, or a problem with its remedy. It changes nothing and needs no network.

    exit status   0 no problem; 1 a problem was found"""

    data: tuple[Path, ...] = ()
    """Shard sets."""
    weights: tuple[Path, ...] = ()
    """Weights: directories of this project, VAR's files, a teacher's."""
    cluster: str | None = None
    """Profile of a SLURM cluster."""
    runs: Path = Path("runs")
    """Where runs lie."""
    json: bool = False
    """A list of findings, for programs."""


def main(argv: list[str]) -> None:
    options = tyro.cli(DoctorOptions, prog="mepa doctor", args=argv)
    findings = list(look(options))
    if options.json:
        log.say(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        log.say("\n".join(line for finding in findings for line in _lines(finding)))
        counts = Counter(finding.level for finding in findings)
        log.say(f"{counts['problem']} problems, {counts['note']} notes, {counts['ok']} ok")
    if any(finding.level == "problem" for finding in findings):
        sys.exit(1)


def look(options: DoctorOptions) -> Iterator[Finding]:
    """Yields all findings."""
    from mepa_ds.doctor import belongings
    from mepa_ds.doctor.computer import look_at_computer
    from mepa_ds.doctor.versions import look_at_versions

    yield from look_at_versions()
    yield from look_at_computer(os.environ.get("OMP_NUM_THREADS"))
    yield from belongings.look_at_runs(options.runs)
    yield from map(belongings.look_at_set, options.data)
    yield from map(belongings.look_at_weights, options.weights)
    yield from belongings.look_at_cluster(options.cluster)


def _lines(finding: Finding) -> Iterator[str]:
    yield f"{finding.level:<8} {finding.about}: {' '.join(finding.text.split())}"
    if finding.remedy:
        yield f"{'':<8}   -> {finding.remedy}"


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
