"""The law of the learning rate, from the runs of a study's sweep (rule tuned)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mepa_ds.errors import UserError
from mepa_ds.files import write_json
from mepa_ds.scaling.laws import fit_lr
from mepa_ds.scaling.running.collect import heldout_of
from mepa_ds.scaling.running.members import Member
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.plan import LR_LAW_NAME, make_plan, write_plan


def is_sweep_done(members: Iterable[Member]) -> bool:
    """Whether every run of the sweep has ended well or diverged."""
    return all(member.state in ("finished", "diverged") for member in members if member.row["role"] == "lr")


def fit_sweep(study: StudyConfig, rows: Sequence[Mapping[str, Any]]) -> None:
    """Fits peak rate = k N^exponent to the best rates of the sweep and writes it to lr_law.json.

    Raises:
        UserError: the best rate of a size is at the edge of the sweep; widen lr.sweep.factors.
    """
    found = [(row["params_matrix"], row["lr_peak"], heldout_of(row)) for row in rows if row["role"] == "lr"]
    finished = [(n, lr, heldout["ce"]) for n, lr, heldout in found if heldout is not None]
    if not finished:
        raise UserError(f"{study.name}: lr.sweep: every run has diverged; lower lr.peak")
    n, lr, loss = (np.array(column, float) for column in zip(*finished, strict=True))
    try:
        law = fit_lr(n, lr, loss)
    except UserError as error:
        raise UserError(f"{study.name}: lr.sweep: {error}") from None
    write_json(study.output_dir / LR_LAW_NAME, law.to_dict())


def replan_after_sweep(study: StudyConfig, members: Iterable[Member]) -> bool:
    """Writes the recipes of the runs that wait for the sweep, once it is done; returns whether it has.

    Raises:
        UserError: see `fit_sweep`.
    """
    found = list(members)
    if not any(member.row["waits_for_sweep"] for member in found) or not is_sweep_done(found):
        return False
    fit_sweep(study, [member.row for member in found])
    memory = {member.name: member.row["memory_bytes"] for member in found}  # it does not depend on the rates
    write_plan(replace(make_plan(study, with_memory=False), memory=memory))
    return True
