"""`mepa scale run`: trains what is left of a study."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mepa_ds import log
from mepa_ds.command_line.submitting import SubmitOptions
from mepa_ds.scaling.running.members import Member
from mepa_ds.scaling.running.run import Fleet, FleetRunner, fleet_of, log_path, plan_if_needed
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.plan import read_study


@dataclass(kw_only=True)
class RunOptions(SubmitOptions):
    """Trains the runs of a study that are not finished. Finished ones are skipped, failed ones start again from their
    last checkpoint, diverged ones stay as they are. Killed and started again, it goes on. Plans the study if it is not
    planned yet.

    exit status   0 all runs are finished; 1 some failed or diverged; 130, 143 stopped, start again to go on"""

    study: tyro.conf.Positional[Path]
    """Study file, or the output_dir of a planned study."""
    jobs: int = 1
    """Runs at a time on this machine, each on its own share of the cores, or its own budget.ranks GPUs."""
    dry_run: bool = False
    """With --slurm: check everything, print the sbatch lines, submit nothing."""


def main(argv: list[str]) -> None:
    options = tyro.cli(RunOptions, prog="mepa scale run", args=argv)
    study = read_study(options.study)
    if options.slurm is not None:
        _submit(study, options)
        return
    options.refuse_without_slurm("dry_run", hint="; mepa scale plan shows what would run here")
    log.make_stdout_a_log()
    plan_if_needed(study)
    members = FleetRunner(fleet_of(study), options.jobs).run()
    if not end_of(fleet_of(study), list(members.values()), f"mepa scale run {study.output_dir}"):
        sys.exit(1)
    log.say(f"all {len(members)} runs are finished; next: mepa scale report {study.output_dir}")


def end_of(fleet: Fleet, members: Sequence[Member], again: str) -> bool:
    """Returns whether all runs are finished; names those that are not, and the command that tries `again`."""
    bad = [member for member in members if member.state != "finished"]
    for member in bad:
        log.say(f"{member.name}: {member.state}; log: {log_path(fleet, member.name)}")
    if bad:
        log.say(f"{len(members) - len(bad)} of {len(members)} runs are finished; {again} tries again")
    return not bad


def _submit(study: StudyConfig, options: RunOptions) -> None:
    from mepa_ds.scaling.running.submission import submit_planned

    def planned() -> Fleet:
        plan_if_needed(study)
        return fleet_of(study)

    if waiting := submit_planned(planned, options, options.dry_run):
        log.say(
            f"{len(waiting)} runs wait for others (mepa scale status {study.output_dir} says for which): run this "
            "command again when those are done"
        )
