"""Which runs of a study can be handed to SLURM now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mepa_ds.scaling.running.members import Member
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.plan import write_manifest


def manifest_of_ready(study: StudyConfig, members: Sequence[Member]) -> tuple[Path | None, list[Member]]:
    """Writes the manifest of the runs that can start now; returns its path and the runs that wait for others.

    Finished runs are left out, and so are diverged ones, which would diverge again. The path is None when nothing can
    start.
    """
    waiting = [member for member in members if member.state == "waiting"]
    left = [member for member in members if member.state not in ("waiting", "finished", "diverged")]
    path = write_manifest(study, [member.name for member in left])
    return (path if left else None), waiting
