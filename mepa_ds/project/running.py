"""A project from its first stage to its report, in its directory."""

from __future__ import annotations

import os
from pathlib import Path

from mepa_ds.errors import UserError
from mepa_ds.project.choosing.choices import Choices
from mepa_ds.project.commands import published_files, stages
from mepa_ds.project.layout import Layout
from mepa_ds.project.looking.facts import ImageFacts
from mepa_ds.project.outcome import write_report
from mepa_ds.project.stages.run import StageRun
from mepa_ds.runtime.run_lock import RunLock


def run_project(images: ImageFacts, chosen: Choices, layout: Layout, folder: Path, program: str) -> None:
    """Does what is not done yet. The working directory is `folder` from here on.

    Args:
        folder: the project's directory; Path() is the working directory.
        program: what messages call this: `quickstart`, or `init`'s command.

    Raises:
        UserError: a command has failed; the next run goes on there. Or another start is at work in the directory, or
            a published file is not there.
    """
    if folder != Path():
        os.chdir(folder)
    if missing := [str(path) for path in published_files(chosen) if not path.exists()]:
        raise UserError(
            f"{folder}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there; commands.sh says "
            "from where to fetch what others have published, and then the same command goes on"
        )
    layout.runs.mkdir(parents=True, exist_ok=True)
    lock = RunLock(layout.runs, "directory")  # two starts would remove what the other one makes
    lock.take()
    try:
        run = StageRun(stages(images, chosen, layout), layout.progress, program, chosen.threads)
        run.run(lambda place, run: write_report(place, run, chosen, layout, folder))
    finally:
        lock.release()
