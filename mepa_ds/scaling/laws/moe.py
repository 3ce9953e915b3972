"""Fits of the laws of mixtures of experts: routed models, experts with size and data, and fine-grained experts.

Shapes: N rows, K terms, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mepa_ds.errors import UserError
from mepa_ds.scaling.laws.chinchilla import centred, rows_of_sizes
from mepa_ds.scaling.laws.fitting.assemble import Parameter, coefficient, exponent, fit_form
from mepa_ds.scaling.laws.fitting.checks import (
    Array,
    check_not_collinear,
    check_points,
    check_sizes,
    labels,
    numbers,
)
from mepa_ds.scaling.laws.fitting.effective import EffectiveExperts
from mepa_ds.scaling.laws.fitting.logsum import LogSum
from mepa_ds.scaling.laws.fitting.minimise import Box
from mepa_ds.scaling.laws.fitting.options import FitOptions
from mepa_ds.scaling.laws.fitting.rows import Rows
from mepa_ds.scaling.laws.fitting.solve import Form, coefficient_range
from mepa_ds.scaling.laws.moe_laws import FineGrainedMoEFit, JointMoEFit, RoutedFit, effective_experts
from mepa_ds.scaling.laws.power import STEEPEST, exactly, start_box

ROUTED_ES, ROUTED_EM = 1.847, 314.478
"""Of S-BASE in arXiv 2202.01169, table 3."""
JOINT_ES, JOINT_EM = 2.0732, 290.4521
"""Of arXiv 2502.05172, table 2."""
_KAPPA = (np.log(1e-2), np.log(1e3))
_MOST = (np.log(1.5), np.log(1e6))
_EXPERT_STARTS = ((np.log(0.7), np.log(10.0)), (np.log(20.0), np.log(2000.0)))
_FREE_DRAWS = 200  # of a law that its runs do not determine: each is slow, and all say so
_LN10 = float(np.log(10))


@dataclass(frozen=True)
class _Experts:
    """log Ê of the rows: fixed numbers, or a warp of two more parameters."""

    z_N: Array
    centre: float
    bounds: tuple[tuple[float, float], ...]
    starts: tuple[tuple[float, float], ...]
    free: bool
    parameters: Mapping[str, Parameter]
    given: Mapping[str, float | None]


def _experts(law: str, E_N: Array, Es: float | None, Em: float | None, published: tuple[float, float]) -> _Experts:
    if (Es is None) != (Em is None):
        raise UserError(f"{law}: Es and Em: give both, or None for both, which fits them")
    if (E_N < 1).any():
        raise UserError(f"{law}: E: below 1; a dense model has 1 expert")
    if Es is not None and Em is not None and not 0 < Es < Em < np.inf:
        raise UserError(f"{law}: Es {Es!r} and Em {Em!r} are not allowed; they must be above 0, and Es below Em")
    start, most = (Es, Em) if Es is not None and Em is not None else published
    z = np.log(effective_experts(E_N, start, most))
    free = Es is None
    ends = (float(np.log(1 / (1 / start - 1 / most))), float(np.log(most)))
    # Es is bounded through kappa, and Em by itself; at the upper bound of kappa Es is that of Em.
    parameters = {
        "Es": Parameter(-2, lambda theta: 1 / (np.exp(-theta[:, -2]) + np.exp(-theta[:, -1])), floor=0.0),
        "Em": Parameter(-1, lambda theta: np.exp(theta[:, -1]), floor=0.0),
    }
    return _Experts(
        z - z.mean(),
        float(z.mean()),
        (_KAPPA, _MOST) if free else tuple((end, end) for end in ends),
        _EXPERT_STARTS if free else tuple((end, end) for end in ends),
        free,
        parameters,
        {} if free else {"Es": Es, "Em": Em},
    )


def _model(fixed_NKP: Array, factors_NKP: Array, E_N: Array, experts: _Experts) -> LogSum:
    """Terms fixed + factors * (log Ê - centre), with two more parameters for the experts."""
    widen = ((0, 0), (0, 0), (0, 2))
    if not experts.free:
        return LogSum(np.pad(fixed_NKP + factors_NKP * experts.z_N[:, None, None], widen))
    return LogSum(np.pad(fixed_NKP, widen), EffectiveExperts(E_N, experts.centre, np.pad(factors_NKP, widen)))


_NOT_IDENTIFIED = (
    "Es and Em were fitted: one table of losses does not identify them, nor the parameters that go with them; only "
    "predictions within the sampled range mean something."
)


def fit_routed(
    N: ArrayLike,
    E: ArrayLike,
    loss: ArrayLike,
    *,
    Es: float | None = None,
    Em: float | None = None,
    cluster: Any = None,
    options: FitOptions | None = None,
) -> RoutedFit:
    """Fits the law of routed language models, all runs having seen the same data.

    Args:
        N: (N,) weights of the dense model that is routed.
        E: (N,) experts, at least 1; 1 is a dense model.
        loss: (N,) loss of each run in nats.
        Es: E_start, Ê of a dense model; None for both fits the two, as the paper does. Published for S-BASE: 1.847.
        Em: E_max, the limit of Ê for many experts. Published for S-BASE: 314.478.

    Raises:
        UserError: fewer than 7 runs (5 with Es and Em given), fewer than 2 sizes, fewer than 4 numbers of experts (2
            with Es and Em given), log N and log E collinear, bad values.
    """
    options = options or FitOptions()
    given = numbers("routed", {"N": N, "E": E, "loss": loss})
    experts = _experts("routed", given["E"], Es, Em, (ROUTED_ES, ROUTED_EM))
    check_points("routed", len(given["N"]), 7 if experts.free else 5, "one more than its parameters")
    check_sizes("routed", {"N": given["N"]}, 2)
    check_sizes("routed", {"E": given["E"]}, 4 if experts.free else 2)
    check_not_collinear("routed", given["N"], given["E"])
    rows = Rows.of({"N": given["N"], "E": given["E"]}, given["loss"], labels("routed", cluster, len(given["N"])))
    experts = _experts("routed", rows.columns["E"], Es, Em, (ROUTED_ES, ROUTED_EM))
    x, x0 = centred(rows.columns["N"])
    zero, one, z0 = np.zeros_like(x), np.ones_like(x), experts.centre
    # Parameters: d, a, b, c in natural logarithms.
    fixed = np.stack([one, x, zero, zero], 1)[:, None]
    factors = np.stack([zero, zero, one, x], 1)[:, None]
    middle = float(rows.log_loss_N.mean())
    box = _box([(middle - 20, middle + 20), *[(-STEEPEST, STEEPEST)] * 3], experts)
    starts = _box([(middle - 0.5, middle + 0.5), (-0.5, 0.1), (-0.5, 0.1), (-0.1, 0.1)], experts, starts=True)
    form = Form(_model(fixed, factors, rows.columns["E"], experts), box, starts.lower_P, starts.upper_P, (-1,))
    parameters = {
        "a": Parameter(1, lambda t: t[:, 1] - t[:, 3] * z0),
        "b": Parameter(2, lambda t: t[:, 2] - t[:, 3] * x0),
        "c": Parameter(3, lambda t: t[:, 3] * _LN10),
        "d": Parameter(0, lambda t: (t[:, 0] - t[:, 1] * x0 - t[:, 2] * z0 + t[:, 3] * x0 * z0) / _LN10),
        **experts.parameters,
    }
    _, values = fit_form(form, rows, parameters, options)
    return RoutedFit(**exactly(values, **experts.given))


def fit_joint_moe(
    N_active: ArrayLike,
    E: ArrayLike,
    D: ArrayLike,
    loss: ArrayLike,
    *,
    Es: float | None = JOINT_ES,
    Em: float | None = JOINT_EM,
    **settings: Any,
) -> JointMoEFit:
    """Fits the joint law of experts, active weights and data.

    Args:
        N_active: (N,) weights that a token meets.
        E: (N,) experts, at least 1; 1 is a dense model.
        D: (N,) tokens that each run has seen.
        loss: (N,) loss of each run in nats.
        Es: the published 2.0732; None for both fits the two, which one table does not identify: a flag says so.
        Em: the published 290.4521.
        settings: `cluster` and `options`, as for `fit_chinchilla`.

    Raises:
        UserError: fewer than 10 runs (12 with Es and Em free), fewer than 3 sizes or lengths or 2 numbers of experts,
            log N and log D collinear, units that cannot be, bad values.
    """
    options, cluster = _settings("joint-moe", settings)
    if Es is None:
        options = replace(options, draws=min(options.draws, _FREE_DRAWS))
    rows = rows_of_sizes("joint-moe", {"N": N_active, "D": D, "E": E, "loss": loss}, cluster, 12 if Es is None else 10)
    N_, D_, E_ = (rows.columns[name] for name in ("N", "D", "E"))
    experts = _experts("joint-moe", E_, Es, Em, (JOINT_ES, JOINT_EM))
    check_sizes("joint-moe", {"N_active": N_, "D": D_}, 3)
    check_sizes("joint-moe", {"E": E_}, 4 if experts.free else 2)
    check_not_collinear("joint-moe", N_, D_)
    (x, x0), (y, y0), z0 = centred(N_), centred(D_), experts.centre
    # Parameters: c, a, b, then alpha, delta, gamma and beta, omega, zeta.
    fixed, factors = np.zeros((len(x), 3, 9)), np.zeros((len(x), 3, 9))
    fixed[:, 0, 0] = fixed[:, 1, 1] = fixed[:, 2, 2] = 1
    fixed[:, 1, 3], factors[:, 1, 4], factors[:, 1, 5] = x, 1, x
    fixed[:, 2, 6], factors[:, 2, 7], factors[:, 2, 8] = y, 1, y
    low, high = coefficient_range(rows.loss_N)
    slopes = [(-STEEPEST, 0.0), (-STEEPEST, STEEPEST), (-2.0, 2.0)]
    box = _box([(low, high)] * 3 + slopes * 2, experts)
    exponents = ((-1.0, -0.03), (-0.5, 0.8), (-0.05, 0.05)) * 2
    starts = start_box(rows.loss_N, 3, (*exponents, *experts.starts))
    form = Form(_model(fixed, factors, E_, experts), box, *starts, (0, 1, 2))

    parameters = {"c": coefficient(0)}
    for names, first, own, mean in (
        (("a", "alpha", "delta", "gamma"), 3, 1, x0),
        (("b", "beta", "omega", "zeta"), 6, 2, y0),
    ):
        parameters |= _joint_term(names, first, own, mean, z0)
    _, values = fit_form(form, rows, parameters | dict(experts.parameters), options)
    values["ranges"] = {"N_active" if name == "N" else name: ends for name, ends in values["ranges"].items()}
    if experts.free:  # Es and Em
        values["flags"] = (_NOT_IDENTIFIED, *values["flags"])
    return JointMoEFit(**exactly(values, **experts.given))


def _joint_term(names: tuple[str, ...], first: int, own: int, mean: float, z0: float) -> dict[str, Parameter]:
    """Coefficient, power, and their changes with ln Ê, from those at centred logarithms."""

    def shift(t: Array) -> Array:
        return -t[:, first] * mean - t[:, first + 1] * z0 + t[:, first + 2] * mean * z0

    return {
        names[0]: coefficient(own, shift),
        names[1]: Parameter(first, lambda t: t[:, first] - t[:, first + 2] * z0),
        names[2]: Parameter(first + 1, lambda t: t[:, first + 1] - t[:, first + 2] * mean),
        names[3]: exponent(first + 2),
    }


def fit_fine_grained_moe(
    N: ArrayLike, G: ArrayLike, D: ArrayLike, loss: ArrayLike, **settings: Any
) -> FineGrainedMoEFit:
    """Fits the law of fine-grained experts.

    Args:
        N: (N,) weights (the paper's are all, without embeddings, at one expansion rate).
        G: (N,) granularity: the hidden width of the dense feed-forward over an expert's, at least 1.
        D: (N,) tokens that each run has seen.
        loss: (N,) loss of each run in nats.
        settings: `cluster` and `options`, as for `fit_chinchilla`.

    Raises:
        UserError: fewer than 8 runs, fewer than 3 values of N, G or D, log N and log D collinear, units that cannot
            be, bad values.
    """
    options, cluster = _settings("fine-grained-moe", settings)
    rows = rows_of_sizes("fine-grained-moe", {"N": N, "D": D, "G": G, "loss": loss}, cluster, 8)
    check_sizes("fine-grained-moe", rows.columns, 3)
    check_not_collinear("fine-grained-moe", rows.columns["N"], rows.columns["D"])
    (x, x0), (y, y0), (w, w0) = (centred(rows.columns[name]) for name in ("N", "D", "G"))
    # Parameters: c, a, g, b, alpha, gamma, beta.
    design = np.zeros((len(x), 4, 7))
    design[:, range(4), range(4)] = 1
    design[:, 1, 4] = design[:, 2, 4] = -x
    design[:, 2, 5], design[:, 3, 6] = -w, -y
    low, high = coefficient_range(rows.loss_N)
    box = Box(np.array([low] * 4 + [0.0] * 3), np.array([high] * 4 + [STEEPEST] * 3))
    starts = start_box(rows.loss_N, 4, ((0.02, 1.0), (0.1, 2.0), (0.02, 1.0)))
    parameters = {
        "a": coefficient(1, lambda t: t[:, 4] * x0),
        "alpha": exponent(4),
        "b": coefficient(3, lambda t: t[:, 6] * y0),
        "beta": exponent(6),
        "g": coefficient(2, lambda t: t[:, 4] * x0 + t[:, 5] * w0),
        "gamma": exponent(5),
        "c": coefficient(0),
    }
    _, values = fit_form(Form(LogSum(design), box, *starts, (0, 1, 2, 3)), rows, parameters, options)
    return FineGrainedMoEFit(**values)


def _settings(law: str, settings: dict[str, Any]) -> tuple[FitOptions, Any]:
    unknown = set(settings) - {"cluster", "options"}
    if unknown:
        raise UserError(f"{law}: unknown arguments {', '.join(sorted(unknown))}; cluster and options are the others")
    return settings.get("options") or FitOptions(), settings.get("cluster")


def _box(ends: list[tuple[float, float]], experts: _Experts, starts: bool = False) -> Box:
    pairs = [*ends, *(experts.starts if starts else experts.bounds)]
    return Box(np.array([low for low, _ in pairs]), np.array([high for _, high in pairs]))
