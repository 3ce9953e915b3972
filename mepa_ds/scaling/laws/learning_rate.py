"""The best learning rate against size and data: log-quadratic minima of sweeps, then a power law.

lr* = k N^a, or k N^a D^b (as in arXiv 2505.13738 and others).

Shapes: N rows, M sweeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from mepa_ds.errors import UserError
from mepa_ds.scaling.laws.fitting.checks import Array, check_not_collinear, numbers, size_groups
from mepa_ds.scaling.laws.fitting.options import FitOptions
from mepa_ds.scaling.laws.fitting.result import Fit, tail_share
from mepa_ds.scaling.laws.minima import Minimum, drawn_lines, drawn_minima, line, parabola


@dataclass(frozen=True, kw_only=True)
class LrFit(Fit):
    """lr* = k N^a. `predict(N)` is a learning rate. `minima` has the sweeps, those left out too, and why.

    `objective` is half the sum of squares of log lr* about the line; `residuals` are of the minima in use.
    """

    law: ClassVar[str] = "lr"
    parameter_names: ClassVar[tuple[str, ...]] = ("k", "a")
    input_names: ClassVar[tuple[str, ...]] = ("N",)

    k: float
    a: float
    minima: tuple[Minimum, ...]

    @classmethod
    def formula(cls, parameters: Mapping[str, Any], *inputs: Any) -> Any:
        """k N^a."""
        return parameters["k"] * inputs[0] ** parameters["a"]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Any:
        """What `to_dict` gave. Raises UserError for anything else."""
        found = super().from_dict(data)
        minima = (Minimum(**minimum) if isinstance(minimum, Mapping) else minimum for minimum in found.minima)
        return replace(found, minima=tuple(minima))


@dataclass(frozen=True, kw_only=True)
class LrDataFit(LrFit):
    """lr* = k N^a D^b."""

    law: ClassVar[str] = "lr-data"
    parameter_names: ClassVar[tuple[str, ...]] = ("k", "a", "b")
    input_names: ClassVar[tuple[str, ...]] = ("N", "D")

    b: float

    @classmethod
    def formula(cls, parameters: Mapping[str, Any], *inputs: Any) -> Any:
        """k N^a D^b."""
        N, D = inputs
        return parameters["k"] * N ** parameters["a"] * D ** parameters["b"]


def fit_lr(
    N: ArrayLike, lr: ArrayLike, loss: ArrayLike, *, D: ArrayLike | None = None, options: FitOptions | None = None
) -> LrFit:
    """Fits the best learning rate of each sweep, and a power law through them.

    A sweep is the runs of one N (and D). Its best rate is the minimum of the parabola of loss in log lr. Sweeps whose
    minimum is at their edge, or with fewer than 3 rates, are left out, and flags name them.

    Args:
        N: (N,) weights of each run.
        lr: (N,) peak learning rate.
        loss: (N,) loss of each run in nats.
        D: (N,) tokens of each run; None: the law has no term of it, and all runs of one N are one sweep.

    Raises:
        UserError: fewer than 2 sweeps with a minimum (3 with D), N and D of the sweeps collinear, bad values.
    """
    options = options or FitOptions()
    given = numbers("lr", {"N": N, "lr": lr, "loss": loss} | ({} if D is None else {"D": D}))
    inputs = ["N"] if D is None else ["N", "D"]
    places, curves = _sweeps(given, inputs)
    minima = tuple(
        Minimum(place, *parabola(rates, losses), float(rates.min()), float(rates.max()))
        for place, (rates, losses) in zip(places, curves, strict=True)
    )
    used = [index for index, minimum in enumerate(minima) if not minimum.why]
    told = [
        f"The sweep at {_told(m, inputs)} ({m.low:.3g} to {m.high:.3g}) is left out: {m.why}." for m in minima if m.why
    ]
    at = np.array([places[index] for index in used]).reshape(len(used), len(inputs))
    if len(np.unique(at[:, 0])) < 2 or len(used) < len(inputs) + 1:
        raise UserError(
            f"lr: {len(used)} sweeps at {len(np.unique(at[:, 0]))} sizes have a minimum inside them, but the law needs "
            f"at least {len(inputs) + 1} at 2 sizes; {' '.join(told) or 'add sweeps.'} Sweep further to both sides"
        )
    if D is not None:
        check_not_collinear("lr", at[:, 0], at[:, 1])
    return _power_law(given, inputs, minima, [curves[index] for index in used], np.log(at), options, told)


def _told(minimum: Minimum, inputs: list[str]) -> str:
    return ", ".join(f"{name} = {value:.4g}" for name, value in zip(inputs, minimum.at, strict=True))


def _sweeps(given: Mapping[str, Array], inputs: list[str]) -> tuple[list[tuple[float, ...]], list[tuple[Array, Array]]]:
    """Where each sweep stands, and its rates and losses, in one order whatever the rows' order."""
    order = np.lexsort([given["loss"], given["lr"], *(given[name] for name in reversed(inputs))])
    columns = {name: values[order] for name, values in given.items()}
    groups = np.stack([size_groups(columns[name]) for name in inputs], 1)
    places, curves = [], []
    for group in np.unique(groups, axis=0):
        use = (groups == group).all(1)
        places.append(tuple(float(np.exp(np.log(columns[name][use]).mean())) for name in inputs))
        curves.append((columns["lr"][use], columns["loss"][use]))
    return places, curves


def _power_law(
    given: Mapping[str, Array],
    inputs: list[str],
    minima: tuple[Minimum, ...],
    curves: list[tuple[Array, Array]],
    log_at: Array,
    options: FitOptions,
    flags: list[str],
) -> LrFit:
    centre = log_at.mean(0)
    design = np.concatenate([np.ones((len(log_at), 1)), log_at - centre], 1)
    best = np.log([minimum.place for minimum in minima if not minimum.why])
    found = line(design, best)
    rest = best - design @ found
    names = ("a", "b")[: len(inputs)]
    values: dict[str, Any] = {"k": float(np.exp(found[0] - found[1:] @ centre))}
    values |= {name: float(value) for name, value in zip(names, found[1:], strict=True)}
    draws: dict[str, tuple[float, ...]] = {}
    intervals: dict[str, tuple[float, float]] = {}
    if options.draws:
        lines = drawn_lines(design, drawn_minima(curves, "parabola", options.draws, options.seed))
        lost = float(np.isnan(lines[:, 0]).mean())
        lines = np.where(np.isnan(lines), found, lines)
        tail = tail_share(options.level, sum(len(rates) - 3 for rates, _ in curves), 1.0)
        drawn = {"k": np.exp(lines[:, 0] - lines[:, 1:] @ centre)}
        drawn |= {name: lines[:, 1 + index] for index, name in enumerate(names)}
        for name, column in drawn.items():
            low, high = np.quantile(column, [tail, 1 - tail], method="median_unbiased")
            draws[name] = tuple(column.tolist())
            intervals[name] = (float(low), float(high)) if lost <= 0.1 else (-np.inf, np.inf)
        if lost > 0.1:
            flags = [*flags, f"The intervals are unbounded: {lost:.0%} of the bootstrap's draws have too few minima."]
    common: dict[str, Any] = {
        "objective": float((rest**2).sum() / 2),
        "options": options,
        "intervals": intervals,
        "flags": tuple(flags),
        "num_rows": len(given["lr"]),
        "num_free": design.shape[1],
        "num_starts": 1,
        "starts_at_optimum": 1,
        "residuals": tuple(rest.tolist()),
        "ranges": {name: (float(given[name].min()), float(given[name].max())) for name in (*inputs, "lr")},
        "draws": draws,
        "inflation": 1.0,
    }
    kind = LrFit if len(inputs) == 1 else LrDataFit
    return kind(minima=minima, **values, **common)
