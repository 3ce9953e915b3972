"""What a design can and cannot tell: refusals and warnings before anything is paid for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mepa_ds.errors import UserError
from mepa_ds.scaling.laws import FITS, MAX_CORRELATION, ChinchillaFit, JointMoEFit
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.runs import StudyRun

_PARAMETERS = {law: len(fit.parameter_names) for law, fit in FITS.items()} | {
    "isoflop": len(ChinchillaFit.parameter_names),  # of the surface beside its minima
    "joint-moe": len(JointMoEFit.parameter_names) - len(("Es", "Em")),  # these are given
}


def check_design(study: StudyConfig, runs: Sequence[StudyRun]) -> None:
    """Raises UserError for a design that cannot carry the study's laws; it names the law and what to add."""
    fitted = [run for run in runs if run.point.role == "fit"]
    dense = [run for run in fitted if run.point.moe is None]
    for law in study.laws:
        rows = fitted if law == "joint-moe" else dense or fitted
        distinct = {(run.counts.matrix, run.point.moe, run.samples, run.point.unique_images) for run in rows}
        if len(distinct) <= _PARAMETERS[law]:
            raise UserError(
                f"{study.name}: laws: {law} has {_PARAMETERS[law]} parameters, and the grids have {len(distinct)} "
                "different runs for it; add sizes or lengths, or leave the law out"
            )
        if law == "power":
            continue
        _check_spread(study, law, rows)
    if "data" in study.laws and len({run.point.unique_images for run in fitted}) < 2:
        raise UserError(f"{study.name}: laws: data needs runs with fewer unique images; give grids.*.unique_images")
    if "joint-moe" in study.laws and len({run.point.moe.num_experts if run.point.moe else 1 for run in fitted}) < 2:
        raise UserError(f"{study.name}: laws: joint-moe needs two numbers of experts or more; give grids.*.moe")
    if "isoflop" in study.laws and not any(grid.flops for grid in study.grids.values()):
        raise UserError(f"{study.name}: laws: isoflop needs a grid of FLOP budgets; give grids.*.flops")


def check_different(study: StudyConfig, runs: Sequence[StudyRun]) -> None:
    """Raises UserError when two runs with different names would train the same model in the same way."""
    first: dict[str, str] = {}
    for run in runs:
        key = run.config.model_dump_json(exclude={"output_dir", "branch_from", "log"})
        if run.point.lr_factor is None and study.lr.rule == "tuned":
            key += "tuned"  # its rate is not that of the sweep's runs
        if key in first:
            raise UserError(f"{study.name}: the runs {first[key]} and {run.name} are the same: leave one of them out")
        first[key] = run.name


def _check_spread(study: StudyConfig, law: str, rows: Sequence[StudyRun]) -> None:
    n, d = (np.log([getter(run) for run in rows]) for getter in (lambda r: r.counts.matrix, lambda r: r.tokens))
    for values, what, key in ((n, "one size", "sizes"), (d, "one length", "samples")):
        if np.ptp(values) == 0:
            raise UserError(f"{study.name}: laws: {law} cannot be fitted to {what}; give more grids.*.{key}")
    correlation = float(np.corrcoef(n, d)[0, 1])
    if abs(correlation) > MAX_CORRELATION:
        raise UserError(
            f"{study.name}: laws: {law}: log N and log D are collinear (correlation {correlation:.3f}), so the "
            "exponents of size and data cannot be told apart; give each size several lengths that are not in "
            "proportion to it"
        )


def warnings_of(study: StudyConfig, runs: Sequence[StudyRun]) -> list[str]:
    """Returns a sentence for each thing that changes from run to run without being named in the study file."""
    return list(_warnings(study, runs))


def _warnings(study: StudyConfig, runs: Sequence[StudyRun]) -> Iterator[str]:
    models = {run.point.size: run.config.model for run in runs}
    rates = {size: model.drop_path_rate for size, model in models.items()}
    if len(set(rates.values())) > 1:
        yield (
            f"drop_path grows with the depth ({_range(rates)}), and regularises large models more; pin it with "
            "set: {model.drop_path: 0.0}"
        )
    gates = {size: model.adaln_gamma_init for size, model in models.items()}
    if len(set(gates.values())) > 1:
        yield (
            f"adaln_gamma_init follows VAR's ladder ({_range(gates)}); pin it with "
            "set: {model.adaln_gamma_init: 1.0e-3}"
        )
    batches = {run.batch for run in runs}
    if len(batches) > 1 and study.lr.rule in ("fixed", "mup"):
        yield (
            f"the batch varies ({min(batches)} to {max(batches)}) and the peak rate does not: lr.peak is the "
            "optimizer's rate, not base_lr, which grows linearly with the batch"
        )
    depths = {model.depth for model in models.values()}
    if study.lr.rule == "mup" and len(depths) > 1:
        yield (
            f"muP transfers the rate over widths, not over depths, and depths vary ({min(depths)} to {max(depths)}): "
            "sweep at two depths too"
        )
    schedule = runs[0].config.optim.schedule
    if schedule == "constant":
        yield "schedule constant never cools down: losses of all lengths lie on one trajectory, and are higher"
    fitted = [run for run in runs if run.point.role == "fit"]
    if study.seeds is None:
        yield "no run is repeated with another seed, so nothing says how much of a difference is noise; give seeds"
    if study.lr.sweep is not None and study.lr.rule != "tuned" and 1.0 not in study.lr.sweep.factors:
        yield "lr.sweep.factors leaves 1.0 out, so the sweep does not contain the rate of the other runs"
    if study.schedule.branches and runs[0].config.optim.cooldown == 0:
        yield "schedule.cooldown is 0, so branches are the trunk's own checkpoints and never cool down"
    if study.budget.price is not None and study.budget.speed is None:
        yield "budget.price without budget.device or budget.flops_per_second: no cost can be said"
    if study.hold_out is None and len({run.counts.matrix for run in fitted}) > 2:
        yield "no run is held out; the report then predicts the largest size from the smaller ones instead"


def _range(values: dict[str, float]) -> str:
    low, high = (pick(values, key=lambda size: values[size]) for pick in (min, max))
    return f"{values[low]:.4g} at {low}, {values[high]:.4g} at {high}"
