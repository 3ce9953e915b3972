"""Best sizes from IsoFLOP profiles: minima of parabolas and of Akima's splines, beside the surface fit.

Approach 2 of Hoffmann et al. (arXiv 2203.15556, section 3.2). Its parabolas are biased even without noise wherever the
profile is not symmetric about its minimum; so the surface (approach 3) stands beside them.

Shapes: N rows, M budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from mepa_ds.errors import UserError
from mepa_ds.scaling.laws.chinchilla import FLOPS_PER, ChinchillaFit, fit_chinchilla
from mepa_ds.scaling.laws.fitting.checks import Array, check_points, labels, numbers
from mepa_ds.scaling.laws.fitting.options import FitOptions
from mepa_ds.scaling.laws.fitting.result import Fit, tail_share
from mepa_ds.scaling.laws.fitting.rows import Rows
from mepa_ds.scaling.laws.minima import Minimum, akima, drawn_lines, drawn_minima, line, parabola

SAME_BUDGET = 0.05
"""Budgets whose logarithms differ by less are one: runs have whole numbers of steps."""
_AKIMA_DRAWS = 200  # each is a spline of its own


@dataclass(frozen=True)
class Route:
    """N* = k C^a by one method. `draws` holds k and a of the bootstrap."""

    k: float
    a: float
    intervals: Mapping[str, tuple[float, float]]
    minima: tuple[Minimum, ...]
    draws: Mapping[str, tuple[float, ...]] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class IsoflopFit(Fit):
    """N* = k C^a of the parabolas' minima (`k`, `a`), of Akima's (`akima`), and of the surface.

    `objective` is half the sum of squares of log N* about the parabolas' line; `residuals` are of the minima in use.
    `akima` and `surface` are None where they cannot be had; a flag says why. `surface_a` and `surface_k` are those of
    C = flops_per N D.
    """

    law: ClassVar[str] = "isoflop"
    parameter_names: ClassVar[tuple[str, ...]] = ("k", "a")
    input_names: ClassVar[tuple[str, ...]] = ("C",)

    k: float
    a: float
    minima: tuple[Minimum, ...]
    akima: Route | None
    surface: ChinchillaFit | None
    surface_k: float
    surface_a: float

    @classmethod
    def formula(cls, parameters: Mapping[str, Any], *inputs: Any) -> Any:
        """N* = k C^a: `predict(C)` is a size, not a loss."""
        (C,) = inputs
        return parameters["k"] * C ** parameters["a"]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> IsoflopFit:
        """What `to_dict` gave. Raises UserError for anything else."""
        surface = data.get("surface")
        found = super().from_dict({**data, "surface": None})
        route = found.akima
        if isinstance(route, Mapping):
            route = Route(**{**route, "minima": tuple(Minimum(**minimum) for minimum in route["minima"])})
        return replace(
            found,
            minima=tuple(Minimum(**minimum) if isinstance(minimum, Mapping) else minimum for minimum in found.minima),
            akima=route,
            surface=None if surface is None else ChinchillaFit.from_dict(surface),
        )


def fit_isoflop(
    C: ArrayLike,
    N: ArrayLike,
    loss: ArrayLike,
    *,
    D: ArrayLike | None = None,
    flops_per: float = FLOPS_PER,
    cluster: Any = None,
    options: FitOptions | None = None,
) -> IsoflopFit:
    """Fits N* = k C^a to the minima of the budgets' profiles, and the surface beside it.

    Args:
        C: (N,) FLOPs of each run. Runs whose C differ by less than 5 % are of one budget.
        N: (N,) weights of each run.
        loss: (N,) loss of each run in nats.
        D: (N,) tokens of each run, for the surface; None: C / (flops_per N).
        flops_per: FLOPs a weight and token.
        cluster: (N,) labels of runs that differ in their seed alone, for the surface.

    Raises:
        UserError: fewer than 2 budgets whose parabola has a minimum within the sampled sizes; bad values.
    """
    options = options or FitOptions()
    columns = {"C": C, "N": N, "loss": loss} | ({} if D is None else {"D": D})
    given = numbers("isoflop", columns)
    check_points("isoflop", len(given["C"]), 6, "3 sizes at 2 budgets")
    if not (np.isfinite(flops_per) and flops_per > 0):
        raise UserError(f"isoflop: flops_per: {flops_per!r} is not allowed; give a number above 0")
    tokens = given.get("D", given["C"] / (flops_per * given["N"]))
    rows = Rows.of(
        {"C": given["C"], "N": given["N"], "D": tokens}, given["loss"], labels("isoflop", cluster, len(tokens))
    )
    budgets, curves = _curves(rows)
    by_parabola = _route("parabola", budgets, curves, options)
    if by_parabola is None:
        minima = _minima("parabola", budgets, curves)
        told = "; ".join(f"{m.at[0]:.3g}: {m.why or 'used'}" for m in minima)
        raise UserError(
            f"isoflop: {sum(not m.why for m in minima)} budgets have a minimum within the sampled sizes, but at least "
            f"2 are needed ({told}); add sizes on both sides of the minima"
        )
    flags = [f"The budget {m.at[0]:.3g} is left out: {m.why}." for m in by_parabola.minima if m.why]
    by_akima = _route("akima", budgets, curves, options)
    if by_akima is None:
        flags.append("Akima's splines have minima at fewer than 2 budgets: 4 sizes are needed at each.")
    surface, surface_k, surface_a, told_surface = _surface(rows, cluster is not None, flops_per, options)
    return IsoflopFit(
        k=by_parabola.k,
        a=by_parabola.a,
        minima=by_parabola.minima,
        akima=by_akima,
        surface=surface,
        surface_k=surface_k,
        surface_a=surface_a,
        **_common(rows, by_parabola, options, (*flags, *told_surface)),
    )


def _curves(rows: Rows) -> tuple[list[float], list[tuple[Array, Array]]]:
    """Budgets, ascending, and the sizes and losses at each."""
    C, N = rows.columns["C"], rows.columns["N"]
    group = np.concatenate([[0], np.cumsum(np.diff(np.log(C)) > SAME_BUDGET)])
    budgets, curves = [], []
    for number in range(int(group[-1]) + 1):
        use = group == number
        budgets.append(float(np.exp(np.log(C[use]).mean())))
        curves.append((N[use], rows.loss_N[use]))
    return budgets, curves


def _minima(method: str, budgets: list[float], curves: list[tuple[Array, Array]]) -> tuple[Minimum, ...]:
    find = parabola if method == "parabola" else akima
    return tuple(
        Minimum((budget,), *find(sizes, losses), float(sizes.min()), float(sizes.max()))
        for budget, (sizes, losses) in zip(budgets, curves, strict=True)
    )


def _route(method: str, budgets: list[float], curves: list[tuple[Array, Array]], options: FitOptions) -> Route | None:
    """The line through the minima, and its draws; None with fewer than two."""
    minima = _minima(method, budgets, curves)
    used = [index for index, minimum in enumerate(minima) if not minimum.why]
    if len(used) < 2:
        return None
    log_c = np.log([budgets[index] for index in used])
    centre = float(log_c.mean())
    design = np.stack([np.ones_like(log_c), log_c - centre], 1)
    log_k, a = line(design, np.log([minima[index].place for index in used]))
    draws: dict[str, tuple[float, ...]] = {}
    intervals: dict[str, tuple[float, float]] = {}
    if options.draws:
        count = options.draws if method == "parabola" else min(options.draws, _AKIMA_DRAWS)
        places = drawn_minima([curves[index] for index in used], method, count, options.seed)
        lines = drawn_lines(design, places)
        values = {"k": np.exp(lines[:, 0] - lines[:, 1] * centre), "a": lines[:, 1]}
        tail = tail_share(options.level, sum(len(curves[index][0]) - 3 for index in used), 1.0)
        for name, drawn in values.items():
            good = drawn[np.isfinite(drawn)]
            draws[name] = tuple(drawn.tolist())
            enough = len(good) >= 0.9 * len(drawn)
            ends = np.quantile(good, [tail, 1 - tail], method="median_unbiased") if enough else (-np.inf, np.inf)
            intervals[name] = (float(ends[0]), float(ends[1]))
    return Route(float(np.exp(log_k - a * centre)), float(a), intervals, minima, draws)


def _surface(
    rows: Rows, clustered: bool, flops_per: float, options: FitOptions
) -> tuple[ChinchillaFit | None, float, float, list[str]]:
    """The Chinchilla fit of all runs, its k and a of N* = k C^a, and what to say of it."""
    cluster = rows.cluster_N if clustered else None
    try:
        fit = fit_chinchilla(rows.columns["N"], rows.columns["D"], rows.loss_N, cluster=cluster, options=options)
        first = fit.optimum(1.0, flops_per).N
    except UserError as error:
        return None, float("nan"), float("nan"), [f"There is no surface fit beside the parabolas: {error}."]
    return fit, first, fit.a, [f"Surface: {flag}" for flag in fit.flags]


def _common(rows: Rows, route: Route, options: FitOptions, flags: tuple[str, ...]) -> dict[str, Any]:
    used = [minimum for minimum in route.minima if not minimum.why]
    rest = np.array([np.log(m.place) - np.log(route.k) - route.a * np.log(m.at[0]) for m in used])
    unbounded = [
        f"The interval of {name} is unbounded: many draws of the bootstrap have too few minima."
        for name, ends in route.intervals.items()
        if not np.isfinite(ends).all()
    ]
    return {
        "objective": float((rest**2).sum() / 2),
        "options": options,
        "intervals": route.intervals,
        "flags": (*flags, *unbounded),
        "num_rows": len(rows.loss_N),
        "num_free": 2,
        "num_starts": 1,
        "starts_at_optimum": 1,
        "residuals": tuple(rest.tolist()),
        "ranges": {name: (float(column.min()), float(column.max())) for name, column in rows.columns.items()},
        "draws": {
            name: tuple(np.where(np.isfinite(values), values, np.nanmedian(values)).tolist())
            for name, values in route.draws.items()
        },
        "inflation": 1.0,
    }
