"""How exactly a design would determine the exponents: simulated from a stated law, before anything is paid for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from mepa_ds.scaling.study.config import Prior, StudyConfig
from mepa_ds.scaling.study.runs import StudyRun

Array = NDArray[np.float64]
TABLES = 100
_STEPS = 50  # of a fit; where it needs more, the design determines next to nothing
"""Simulated tables; their fits' 95 % range is the interval to expect."""
USELESS = 0.5
"""An exponent whose range is wider than this share of its value is not determined."""


def expected_intervals(study: StudyConfig, runs: Sequence[StudyRun]) -> dict[str, Any]:
    """Returns the ranges of alpha, beta and a = beta / (alpha + beta) over fits of simulated tables.

    Losses are drawn at the dense runs of the fit from the study's prior, with its noise. `flags` has a sentence for
    each exponent that the design would not determine. Empty for a study without the law `chinchilla`.
    """
    rows = [run for run in runs if run.point.role == "fit" and run.point.moe is None]
    if "chinchilla" not in study.laws or not rows:
        return {}
    prior = study.prior
    n, d = np.array([run.counts.matrix for run in rows], float), np.array([run.tokens for run in rows], float)
    law = prior.E + prior.A * n**-prior.alpha + prior.B * d**-prior.beta
    rng = np.random.default_rng(0)
    found = [_fit(n, d, law * np.exp(prior.noise * rng.standard_normal(len(law))), prior) for _ in range(TABLES)]
    truth = {"alpha": prior.alpha, "beta": prior.beta, "a": prior.beta / (prior.alpha + prior.beta)}
    low, high = np.quantile(np.array(found), [0.025, 0.975], axis=0)
    ranges = {name: [float(low[k]), float(high[k])] for k, name in enumerate(truth)}
    flags = [
        f"{name} would lie anywhere between {ranges[name][0]:.3g} and {ranges[name][1]:.3g} (the prior has "
        f"{value:.3g}): the design does not determine it; spread sizes and lengths wider, or repeat runs"
        for name, value in truth.items()
        if ranges[name][1] - ranges[name][0] > USELESS * value
    ]
    return {"tables": TABLES, "prior": truth, "ranges": ranges, "flags": flags}


def _fit(n: Array, d: Array, losses: Array, prior: Prior) -> tuple[float, float, float]:
    """Returns alpha, beta and a of the least squares in log loss, from a start at the prior.

    The prior is known here, so no search for the optimum is needed, which is what makes many tables cheap.
    """
    log_n, log_d, log_losses = np.log(n), np.log(d), np.log(losses)

    def residuals(x: Array) -> Array:
        log_terms = np.stack([np.full_like(log_n, x[0]), x[1] - x[3] * log_n, x[2] - x[4] * log_d])
        return np.logaddexp.reduce(log_terms, axis=0) - log_losses

    start = [np.log(max(prior.E, 1e-6)), np.log(prior.A), np.log(prior.B), prior.alpha, prior.beta]
    with np.errstate(all="ignore"):
        x = least_squares(residuals, start, x_scale=[1, 1, 1, 0.1, 0.1], max_nfev=_STEPS).x
    return float(x[3]), float(x[4]), float(x[4] / (x[3] + x[4]))
