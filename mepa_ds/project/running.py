"""A project from its first stage to its report, in its directory."""

from __future__ import annotations

import os
from pathlib import Path

from mepa_ds.project.choosing.choices import Choices
from mepa_ds.project.commands import stages
from mepa_ds.project.layout import Layout
from mepa_ds.project.looking.facts import ImageFacts
from mepa_ds.project.outcome import write_report
from mepa_ds.project.stages.run import StageRun


def run_project(images: ImageFacts, chosen: Choices, layout: Layout, folder: Path, program: str) -> None:
    """Does what is not done yet. The working directory is `folder` from here on.

    Args:
        folder: the project's directory; Path() is the working directory.
        program: what messages call this: `quickstart`, or `init`'s command.

    Raises:
        UserError: a command has failed; the next run goes on there.
    """
    if folder != Path():
        os.chdir(folder)
    run = StageRun(stages(images, chosen, layout), layout.progress, program, chosen.threads)
    run.run(lambda place, run: write_report(place, run, chosen, layout, folder))
