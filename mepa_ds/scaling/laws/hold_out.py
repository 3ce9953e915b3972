"""Laws against runs that they have not seen: left out on purpose, or the largest size from all smaller ones.

Shapes: N rows, H rows held out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mepa_ds.errors import UserError
from mepa_ds.scaling.laws.chinchilla import ChinchillaFit, fit_chinchilla
from mepa_ds.scaling.laws.data_constrained import DataConstrainedFit, fit_data_constrained
from mepa_ds.scaling.laws.fitting.checks import Array, labels, numbers, size_groups
from mepa_ds.scaling.laws.fitting.result import Fit
from mepa_ds.scaling.laws.moe import fit_fine_grained_moe, fit_joint_moe, fit_routed
from mepa_ds.scaling.laws.moe_laws import FineGrainedMoEFit, JointMoEFit, RoutedFit
from mepa_ds.scaling.laws.power import PowerFit, fit_power

LAWS: Mapping[str, tuple[Callable[..., Fit], tuple[str, ...]]] = {
    kind.law: (fit, kind.input_names)
    for kind, fit in (
        (PowerFit, fit_power),
        (ChinchillaFit, fit_chinchilla),
        (DataConstrainedFit, fit_data_constrained),
        (RoutedFit, fit_routed),
        (JointMoEFit, fit_joint_moe),
        (FineGrainedMoEFit, fit_fine_grained_moe),
    )
}
"""Laws that predict a loss: how each is fitted, and its inputs, the size first."""


@dataclass(frozen=True)
class HeldOut:
    """Predictions of runs that were not fitted. Tuples have one entry a run held out (H).

    Attributes:
        fit: the law without these runs.
        rows: their numbers among the rows given.
        inputs: their inputs, by name.
        measured: their losses.
        predicted: the law's losses.
        low, high: the intervals of `Fit.predict_interval`, noise included.
        error: log(measured) - log(predicted).
        inside: whether each loss lies within its interval.
        noise_floor: standard deviation of log loss among runs that differ in their seed alone; None without such runs.
        noise_runs: how many degrees of freedom it has.
        flags: what a reader must know.
    """

    fit: Fit
    rows: tuple[int, ...]
    inputs: Mapping[str, tuple[float, ...]]
    measured: tuple[float, ...]
    predicted: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    error: tuple[float, ...]
    inside: tuple[bool, ...]
    noise_floor: float | None
    noise_runs: int
    flags: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, all numbers in full; the fit as its own `to_dict`."""
        plain = asdict(self) | {"fit": self.fit.to_dict()}
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in plain.items() if key != "inputs"
        } | {"inputs": {name: list(values) for name, values in self.inputs.items()}}


def noise_floor(loss: ArrayLike, cluster: Any) -> tuple[float | None, int]:
    """Standard deviation of log loss within clusters, pooled, and its degrees of freedom; None without any.

    Args:
        loss: (N,) losses.
        cluster: (N,) labels of runs that differ in their seed alone, or None.

    Raises:
        UserError: bad losses, or not one label a run.
    """
    log_loss = np.log(numbers("hold-out", {"loss": loss})["loss"])
    if cluster is None:
        return None, 0
    groups = labels("hold-out", cluster, len(log_loss))
    count = np.bincount(groups)
    mean = np.bincount(groups, log_loss) / count
    freedom = int((count - 1).sum())
    if freedom == 0:
        return None, 0
    return float(np.sqrt(((log_loss - mean[groups]) ** 2).sum() / freedom)), freedom


def hold_out(
    law: str, columns: Mapping[str, ArrayLike], held: ArrayLike, *, cluster: Any = None, **settings: Any
) -> HeldOut:
    """Fits a law without some runs and predicts them.

    Args:
        law: one of `LAWS`.
        columns: the law's inputs and `loss`, each (N,).
        held: (N,) True for runs to leave out.
        cluster: (N,) labels of runs that differ in their seed alone; all of a cluster are on one side.
        settings: arguments of the law's fit (`options`, `tied`, ...).

    Raises:
        UserError: an unknown law, missing columns, none or all runs held out, a cluster on both sides, and what the
            law's fit refuses.
    """
    fit_law, names = _law(law, columns)
    given = numbers(law, {name: columns[name] for name in (*names, "loss")})
    count = len(given["loss"])
    out = np.asarray(held)
    if out.dtype != bool or out.shape != (count,):
        raise UserError(f"{law}: held: give one True or False a run ({count} of them)")
    if not out.any() or out.all():
        raise UserError(f"{law}: {int(out.sum())} of {count} runs are held out; some must be, and some must be left")
    groups = labels(law, cluster, count)
    shared = set(groups[out].tolist()) & set(groups[~out].tolist())
    if shared:
        raise UserError(
            f"{law}: {len(shared)} clusters have seeds among both the runs held out and those fitted; hold out all "
            "seeds of a run or none"
        )
    fit = fit_law(
        *(given[name][~out] for name in names),
        given["loss"][~out],
        cluster=None if cluster is None else groups[~out],
        **settings,
    )
    return _compare(fit, given, names, out, noise_floor(given["loss"], cluster))


def _law(law: str, columns: Mapping[str, ArrayLike]) -> tuple[Callable[..., Fit], tuple[str, ...]]:
    if law not in LAWS:
        raise UserError(f"law {law!r}: no such law to hold runs out of; choose one of {', '.join(LAWS)}")
    fit_law, names = LAWS[law]
    missing = [name for name in (*names, "loss") if name not in columns]
    if missing:
        raise UserError(f"{law}: columns {', '.join(missing)} are missing; there are {', '.join(columns)}")
    return fit_law, names


def _compare(
    fit: Fit,
    given: Mapping[str, Array],
    names: tuple[str, ...],
    out: NDArray[np.bool_],
    floor: tuple[float | None, int],
) -> HeldOut:
    inputs = [given[name][out] for name in names]
    measured, predicted = given["loss"][out], np.asarray(fit.predict(*inputs))
    low, high = fit.predict_interval(*inputs) if fit.draws else (np.full(len(measured), np.nan),) * 2
    error = np.log(measured) - np.log(predicted)
    inside = (low <= measured) & (measured <= high)
    flags = []
    if floor[0] is None:
        flags.append("There are no runs that differ in their seed alone, so no noise floor to hold the error against.")
    if fit.draws and not inside.all():
        flags.append(f"{int((~inside).sum())} of {len(inside)} runs held out lie outside their interval.")
    return HeldOut(
        fit=fit,
        rows=tuple(np.flatnonzero(out).tolist()),
        inputs={name: tuple(values.tolist()) for name, values in zip(names, inputs, strict=True)},
        measured=tuple(measured.tolist()),
        predicted=tuple(predicted.tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        error=tuple(error.tolist()),
        inside=tuple(inside.tolist()),
        noise_floor=floor[0],
        noise_runs=floor[1],
        flags=tuple(flags),
    )


def rolling(law: str, columns: Mapping[str, ArrayLike], *, cluster: Any = None, **settings: Any) -> tuple[HeldOut, ...]:
    """Predicts each size from all smaller ones, as far down as the law can be fitted; the largest size comes last.

    Args:
        law, columns, cluster, settings: as for `hold_out`; the law's first input is the size.

    Raises:
        UserError: as `hold_out`; the law cannot be fitted even to all sizes but the largest.
    """
    _, names = _law(law, columns)
    given = numbers(law, {name: columns[name] for name in (*names, "loss")})
    sizes = size_groups(given[names[0]])
    marks = None if cluster is None else labels(law, cluster, len(sizes))
    results: list[HeldOut] = []
    for size in range(int(sizes.max()), 0, -1):
        use = sizes <= size
        part = {name: values[use] for name, values in given.items()}
        try:
            found = hold_out(law, part, sizes[use] == size, cluster=None if marks is None else marks[use], **settings)
        except UserError:
            if not results:
                raise
            break
        rows = np.flatnonzero(use)[list(found.rows)]
        results.append(HeldOut(**{**vars(found), "rows": tuple(rows.tolist())}))
    if not results:
        raise UserError(f"{law}: {names[0]}: one size only, so there is nothing to predict it from; add smaller sizes")
    return tuple(reversed(results))
