"""`mepa ablate`: trains every arm of an ablation with several seeds, and compares them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mepa_ds import log
from mepa_ds.ablation.config import AblationConfig
from mepa_ds.ablation.plan import make_plan, planned, read_ablation
from mepa_ds.cli.scale.run import end_of
from mepa_ds.command_line import entry
from mepa_ds.command_line.submitting import SubmitOptions
from mepa_ds.command_line.tables import aligned
from mepa_ds.scaling.running.run import FleetRunner


@dataclass(kw_only=True)
class AblateOptions(SubmitOptions):
    """Trains every arm of an ablation with several seeds, scores them alike, and writes the comparison: table, paired
    differences with intervals, figures. Killed and started again, it goes on; once all runs are finished it only
    writes the report again.

    exit status   0 all runs are finished; 1 some failed or diverged; 130, 143 stopped, start again to go on"""

    ablation: tyro.conf.Positional[Path]
    """File of the ablation (recipes/ablation/ has some), or the output_dir of a planned one."""
    jobs: int = 1
    """Runs at a time on this machine, each on its own share of the cores, or its own GPUs."""
    dry_run: bool = False
    """Check the recipes, not whether their data are there; print the runs (with --slurm: the sbatch lines), train
    nothing."""
    report_only: bool = False
    """Write the report of the runs that are finished, train nothing."""
    write_into: Path | None = None
    """Also put the comparison into this Markdown file, between the lines <!-- mepa ablate: begin --> and end."""
    slurm: str | None = None
    """Submit to this cluster instead (a profile in slurm/clusters/), as one array; the same command without --slurm
    writes the report when the jobs are done."""


def main(argv: list[str]) -> None:
    options = tyro.cli(AblateOptions, prog="mepa ablate", args=argv)
    options.refuse_without_slurm()
    ablation = read_ablation(options.ablation)
    if options.slurm is not None:
        from mepa_ds.scaling.running.submission import submit_planned

        submit_planned(planned(ablation).fleet, options, options.dry_run)
    elif options.dry_run:
        log.say(_format(ablation))
    else:
        _run(ablation, options)


def _run(ablation: AblationConfig, options: AblateOptions) -> None:
    from mepa_ds.ablation.report import page_around, write_report

    log.make_stdout_a_log()
    if options.write_into is not None:
        page_around(options.write_into)  # before an hour of training
    fleet, is_whole = planned(ablation).fleet(), True
    if not options.report_only:
        members = FleetRunner(fleet, options.jobs).run()
        is_whole = end_of(fleet, list(members.values()), f"mepa ablate {ablation.output_dir}")
    log.say(f"report: {write_report(ablation, fleet.members(), options.write_into)}")
    if options.write_into is not None:
        log.say(f"        {options.write_into}")
    if not is_whole:
        sys.exit(1)


def _format(ablation: AblationConfig) -> str:
    rows, _ = make_plan(ablation)
    first = next(row for row in rows if row["arm"] == ablation.baseline)
    lines = aligned(
        [
            ("run", "active", "total", "FLOPs", "steps", "images"),
            *(
                (
                    row["run"],
                    f"{row['params_active'] / 1e6:.3f}M",
                    f"{row['params_total'] / 1e6:.3f}M",
                    f"{row['flops_image'] / first['flops_image']:.3f}",
                    str(row["steps"]),
                    str(row["samples"]),
                )
                for row in rows
            ),
        ],
        left=1,
    )
    total = sum(row["paid_flops"] for row in rows)
    return "\n".join(
        [
            *lines,
            f"{len(rows)} runs, {total:.3g} model FLOPs; FLOPs: active, of {ablation.baseline}'s",
            "dry run: nothing was written",
        ]
    )


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
