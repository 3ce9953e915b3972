"""`mepa sweep`: trains a recipe with many values of its keys, and says which came out best."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.command_line.tables import aligned
from mepa_ds.errors import UserError

if TYPE_CHECKING:
    from mepa_ds.sweep.config import SweepConfig


@dataclass
class SweepOptions:
    """Trains a base recipe with every combination of values of its keys, and writes a table, the lowest held-out
    cross-entropy first (sweep.csv and sweep.json in the output_dir). Killed and started again, it goes on.

    exit status   0 all runs are finished; 1 some failed or diverged; 130, 143 stopped, start again to go on"""

    sweep: tyro.conf.Positional[Path]
    """File of the sweep (recipes/sweeps/ has one), or the output_dir of a planned one."""
    jobs: int = 1
    """Runs at a time on this machine, each on its own share of the cores, or its own GPUs."""
    dry_run: bool = False
    """Check the recipes, not whether their data are there; print the runs (with --cluster: the sbatch lines), train
    nothing."""
    table_only: bool = False
    """Write the table of the runs as they are now, train nothing."""
    cluster: str | None = None
    """Submit to this cluster instead (a profile in slurm/clusters/), as one array; the same command without --cluster
    writes the table when the jobs are done."""
    nodes: int = 1
    """With --cluster: nodes of each run."""
    time: str | None = None
    """With --cluster: limit of one start, such as 12:00:00."""
    limit: int = 8
    """With --cluster: runs at a time."""


def main(argv: list[str]) -> None:
    options = tyro.cli(SweepOptions, prog="mepa sweep", args=argv)
    from mepa_ds.sweep.plan import read_sweep

    defaults = SweepOptions(options.sweep)
    if options.cluster is None:
        for name in ("nodes", "time", "limit"):
            if getattr(options, name) != getattr(defaults, name):
                raise UserError(f"--{name} belongs to --cluster")
    sweep = read_sweep(options.sweep)
    if options.cluster is not None:
        _submit(sweep, options)
    elif options.dry_run:
        print(_format_plan(sweep))
    else:
        _run(sweep, options)


def _run(sweep: SweepConfig, options: SweepOptions) -> None:
    from mepa_ds.cli.scale.run import end_of
    from mepa_ds.scaling.running.run import FleetRunner
    from mepa_ds.sweep.plan import fleet_of, plan_if_needed
    from mepa_ds.sweep.table import format_table, table_of, write_table

    log.make_stdout_a_log()
    plan_if_needed(sweep)
    fleet, is_whole = fleet_of(sweep), True
    if not options.table_only:
        members = FleetRunner(fleet, options.jobs).run()
        is_whole = end_of(fleet, list(members.values()), f"mepa sweep {sweep.output_dir}")
    rows = table_of(fleet.members())
    print("\n".join(aligned(format_table(rows))))
    print(f"table: {write_table(rows, sweep.output_dir)}")
    if not is_whole:
        sys.exit(1)


def _submit(sweep: SweepConfig, options: SweepOptions) -> None:
    from mepa_ds.scaling.running.submission import Terms, submit_ready
    from mepa_ds.slurm.profile import read_profile, root
    from mepa_ds.sweep.plan import fleet_of, plan_if_needed

    profile = read_profile(options.cluster)
    os.chdir(root())  # where the jobs start, and so what the recipes' paths are relative to
    plan_if_needed(sweep)
    submit_ready(fleet_of(sweep), profile, Terms(options.nodes, options.time, options.limit, options.dry_run))


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
