"""What the runs of a study need: hours, money, memory of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mepa_ds import distributed
from mepa_ds.errors import UserError
from mepa_ds.planning.plan import Plan, plan_run, this_machine
from mepa_ds.progress import Progress
from mepa_ds.scaling.study.config import Budget, StudyConfig
from mepa_ds.scaling.study.runs import StudyRun


def hours_of(run: StudyRun, budget: Budget) -> float | None:
    """Device-hours of the run's own steps; None if the study does not say how fast a device is."""
    return None if budget.speed is None else run.paid_flops / budget.speed / 3600


def check_budget(study: StudyConfig, runs: Sequence[StudyRun]) -> None:
    """Raises UserError when the study needs more device-hours than budget.hours."""
    limit = study.budget.hours
    needed = sum(hours_of(run, study.budget) or 0.0 for run in runs)
    if limit is not None and needed > limit:
        most = max(runs, key=lambda run: run.paid_flops)
        share = most.paid_flops / sum(run.paid_flops for run in runs)
        raise UserError(
            f"{study.name}: the runs need {needed:.4g} device-hours, budget.hours is {limit:g}; the dearest run, "
            f"{most.name}, takes {share:.0%} of it: leave sizes or lengths out, or raise the budget"
        )


def memory_of(study: StudyConfig, runs: Sequence[StudyRun]) -> dict[str, float]:
    """Returns the bytes that a rank of each run needs at its peak, by the run's name.

    Raises:
        UserError: a run does not fit into the memory of a rank.
    """
    plans: dict[tuple[str, int, int], Plan] = {}
    needed: dict[str, float] = {}
    memory = None if study.budget.memory_gb is None else study.budget.memory_gb * 1e9
    for run in Progress(runs, desc="memory of the runs", unit="run", leave=False):
        config = run.config
        key = (config.model.model_dump_json(), run.batch, config.train.accumulation)
        if key not in plans:
            machine = this_machine(config, study.budget.ranks, memory)
            if memory is None and not distributed.uses_gpu() and study.budget.device is not None:
                machine = replace(machine, memory=None)
            plans[key] = plan_run(config, machine)
        if problems := plans[key].problems:
            raise UserError(f"{study.name}: run {run.name} does not fit: {'; '.join(problems)}")
        needed[run.name] = plans[key].peak
    return needed
