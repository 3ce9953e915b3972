"""Which runs of a study can be handed to SLURM now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mepa_ds.files import write_text
from mepa_ds.scaling.running.members import Member
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.plan import MANIFEST_NAME


def manifest_of_ready(study: StudyConfig, members: Sequence[Member]) -> tuple[Path | None, list[Member]]:
    """Writes the manifest of all runs that can start, or are done; returns its path and the runs that wait for others.

    A diverged run is left out, since it would diverge again. The path is None when nothing is left to run.
    """
    waiting = [member for member in members if member.state == "waiting"]
    listed = [member for member in members if member.state not in ("waiting", "diverged")]
    path = study.output_dir / MANIFEST_NAME
    write_text(path, "".join(f"{member.row['recipe']}\n" for member in listed))
    left = [member for member in listed if member.state != "finished"]
    return (path if left else None), waiting
