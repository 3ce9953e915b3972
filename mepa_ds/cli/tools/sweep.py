"""`mepa sweep`: trains a recipe with many values of its keys, and says which came out best."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.command_line.submitting import SubmitOptions
from mepa_ds.command_line.tables import aligned

if TYPE_CHECKING:
    from mepa_ds.sweep.config import SweepConfig


@dataclass(kw_only=True)
class SweepOptions(SubmitOptions):
    """Trains a base recipe with every combination of values of its keys, and writes a table, the lowest held-out
    cross-entropy first (sweep.csv and sweep.json in the output_dir). Killed and started again, it goes on.

    exit status   0 all runs are finished; 1 some failed or diverged; 130, 143 stopped, start again to go on"""

    sweep: tyro.conf.Positional[Path]
    """File of the sweep (recipes/sweeps/ has one), or the output_dir of a planned one."""
    jobs: int = 1
    """Runs at a time on this machine, each on its own share of the cores, or its own GPUs."""
    dry_run: bool = False
    """Check the recipes, not whether their data are there; print the runs (with --slurm: the sbatch lines), train
    nothing."""
    table_only: bool = False
    """Write the table of the runs as they are now, train nothing."""
    slurm: str | None = None
    """Submit to this cluster instead (a profile in slurm/clusters/), as one array; the same command without --slurm
    writes the table when the jobs are done."""


def main(argv: list[str]) -> None:
    options = tyro.cli(SweepOptions, prog="mepa sweep", args=argv)
    from mepa_ds.sweep.plan import planned, read_sweep

    options.refuse_without_slurm()
    sweep = read_sweep(options.sweep)
    if options.slurm is not None:
        from mepa_ds.scaling.running.submission import submit_planned

        submit_planned(planned(sweep).fleet, options, options.dry_run)
    elif options.dry_run:
        log.say(_format_plan(sweep))
    else:
        _run(sweep, options)


def _run(sweep: SweepConfig, options: SweepOptions) -> None:
    from mepa_ds.cli.scale.run import end_of
    from mepa_ds.scaling.running.run import FleetRunner
    from mepa_ds.sweep.plan import planned
    from mepa_ds.sweep.table import format_table, table_of, write_table

    log.make_stdout_a_log()
    fleet, is_whole = planned(sweep).fleet(), True
    if not options.table_only:
        members = FleetRunner(fleet, options.jobs).run()
        is_whole = end_of(fleet, list(members.values()), f"mepa sweep {sweep.output_dir}")
    rows = table_of(fleet.members())
    log.say("\n".join(aligned(format_table(rows))))
    log.say(f"table: {write_table(rows, sweep.output_dir)}")
    if not is_whole:
        sys.exit(1)


def _format_plan(sweep: SweepConfig) -> str:
    from mepa_ds.sweep.plan import make_plan

    rows, _ = make_plan(sweep)
    cells = [("run", "active", "steps", "images")]
    cells += [(r["run"], f"{r['params_active'] / 1e6:.3f}M", str(r["steps"]), str(r["samples"])) for r in rows]
    total = sum(row["paid_flops"] for row in rows)
    return "\n".join(
        [*aligned(cells, left=1), f"{len(rows)} runs, {total:.3g} model FLOPs", "dry run: nothing was written"]
    )


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
