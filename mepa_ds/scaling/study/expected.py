"""How exactly a design would determine the exponents: simulated from a stated law, before anything is paid for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mepa_ds.errors import UserError
from mepa_ds.scaling.laws import FitOptions, fit_chinchilla
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.runs import StudyRun

TABLES = 40
"""Simulated tables; their fits' 95 % range is the interval to expect."""
USELESS = 0.5
"""An exponent whose range is wider than this share of its value is not determined."""


def expected_intervals(study: StudyConfig, runs: Sequence[StudyRun]) -> dict[str, Any]:
    """Returns the ranges of alpha, beta and a = beta / (alpha + beta) over fits of simulated tables.

    Losses are drawn at the dense runs of the fit from the study's prior, with its noise. `failed` counts tables that
    could not be fitted; `flags` has a sentence for each exponent that the design would not determine. Empty for a
    study without the law `chinchilla`.
    """
    rows = [run for run in runs if run.point.role == "fit" and run.point.moe is None]
    if "chinchilla" not in study.laws or not rows:
        return {}
    prior = study.prior
    n, d = np.array([run.counts.matrix for run in rows], float), np.array([run.tokens for run in rows], float)
    law = prior.E + prior.A * n**-prior.alpha + prior.B * d**-prior.beta
    rng, found, failed = np.random.default_rng(0), [], 0
    for _ in range(TABLES):
        losses = law * np.exp(prior.noise * rng.standard_normal(len(law)))
        try:
            fit = fit_chinchilla(n, d, losses, options=FitOptions(draws=0))
        except UserError:
            failed += 1
            continue
        found.append((fit.alpha, fit.beta, fit.a))
    if not found:
        return {"tables": TABLES, "failed": failed, "flags": ["no simulated table could be fitted"]}
    truth = {"alpha": prior.alpha, "beta": prior.beta, "a": prior.beta / (prior.alpha + prior.beta)}
    low, high = np.quantile(np.array(found), [0.025, 0.975], axis=0)
    ranges = {name: [float(low[k]), float(high[k])] for k, name in enumerate(truth)}
    flags = [
        f"{name} would lie anywhere between {ranges[name][0]:.3g} and {ranges[name][1]:.3g} (the prior has "
        f"{value:.3g}): the design does not determine it; spread sizes and lengths wider, or repeat runs"
        for name, value in truth.items()
        if ranges[name][1] - ranges[name][0] > USELESS * value
    ]
    return {"tables": TABLES, "failed": failed, "prior": truth, "ranges": ranges, "flags": flags}
