"""Hands the runs of a fleet that can start now to SLURM, as one array."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mepa_ds.command_line.submitting import SubmitOptions
from mepa_ds.scaling.running.members import Member, set_stale_aside
from mepa_ds.scaling.running.run import Fleet
from mepa_ds.scaling.study.plan import write_manifest
from mepa_ds.slurm.profile import read_profile, root
from mepa_ds.slurm.submit import Request, submit_recipe


def submit_planned(planned: Callable[[], Fleet], options: SubmitOptions, dry_run: bool) -> list[Member]:
    """Submits the runs that can start now to the cluster that the options name; returns those that wait for others.

    `planned` is called where the jobs start, since that is what paths in recipes are relative to.

    Raises:
        UserError: something does not fit the cluster; nothing was submitted.
    """
    assert options.slurm is not None
    profile = read_profile(options.slurm)
    os.chdir(root())
    fleet = planned()
    members = fleet.members()
    if fleet.replan(members):
        members = fleet.members()
    manifest, waiting = manifest_of_ready(fleet, members)
    for member in members if not dry_run else ():
        set_stale_aside(member.row)
    if manifest is not None:
        request = Request(
            manifest,
            job="scaling-study",
            nodes=options.nodes,
            time=options.time,
            limit=options.limit,
            dry_run=dry_run,
        )
        submit_recipe(request, profile)
    return waiting


def manifest_of_ready(fleet: Fleet, members: Sequence[Member]) -> tuple[Path | None, list[Member]]:
    """Writes the manifest of the runs that can start now; returns its path and the runs that wait for others.

    Finished runs are left out, and so are diverged ones, which would diverge again. The path is None when nothing can
    start.
    """
    waiting = [member for member in members if member.state == "waiting"]
    left = [member for member in members if member.state not in ("waiting", "finished", "diverged")]
    path = write_manifest(fleet.output_dir, fleet.name, [Path(member.row["recipe"]) for member in left])
    return (path if left else None), waiting
