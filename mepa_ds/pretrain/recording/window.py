"""Means over the steps since the last record, so that a line in the log does not show a single batch.

Shapes: S scales.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mepa_ds import distributed
from mepa_ds.objective.objective import ScaleScores
from mepa_ds.objective.reports import add_up, score_report
from mepa_ds.pretrain.recording.report import StepReport

_SCORES = [field.name for field in fields(ScaleScores)]


class Window:
    """Sums of loss terms, scores and gradient norms, over applied steps only.

    The numbers of a step stay on the device until `reduce`. Steps are added one by one, in double precision. So the
    means are exactly the same whether or not a checkpoint cuts the window in two (`kept` is what `reduce` returned).
    """

    def __init__(self, kept: dict[str, Any]):
        self.restart(kept)

    def restart(self, kept: dict[str, Any]) -> None:
        """Forgets all steps except the ones summed in `kept`."""
        self._waiting: list[Tensor] = []
        self._names: list[str] = kept.get("names", [])
        self._sums: list[float] = kept.get("sums", [])
        self._grad_norm: float = kept.get("grad_norm", 0.0)
        self._steps: int = kept.get("steps", 0)
        """The number of steps in the sums."""

    def note(self, report: StepReport) -> None:
        """Adds a step, if it was applied."""
        if not report.applied:
            return
        self._names = list(report.losses[0].terms)
        of_each = [{**losses.terms, "total": losses.total.detach()} for losses in report.losses]
        terms = torch.stack([torch.stack([terms[name].float() for name in self._names]) for terms in of_each])
        scores = add_up([losses.scores for losses in report.losses])
        self._waiting.append(torch.cat([terms.mean(0), *(getattr(scores, name).float() for name in _SCORES)]))
        self._grad_norm += report.grad_norm

    def reduce(self) -> tuple[dict[str, Any], list[float]]:
        """Returns the sums so far (`kept`; empty without a step) and the losses of newly added steps. Collective."""
        losses = []
        if self._waiting:
            reduced = distributed.sums_over_ranks([torch.stack(self._waiting)])[0]
            reduced[:, : len(self._names)] /= distributed.world_size()
            rows = reduced.tolist()
            for row in rows:
                self._sums = [total + value for total, value in zip(self._sums or [0.0] * len(row), row, strict=True)]
                losses.append(row[self._names.index("total")])
            self._steps += len(rows)
            self._waiting = []
        if not self._steps:
            return {}, losses
        kept = {"names": self._names, "sums": self._sums, "grad_norm": self._grad_norm, "steps": self._steps}
        return kept, losses

    def means(self, names: list[str], num_scales: int) -> dict[str, Any]:
        """Returns the means of what was reduced, and starts a new window.

        The keys are `steps`, `loss`, its terms, the scores and `grad_norm`. Means are NaN without a step.
        """
        steps, count = self._steps, len(names)
        sums = self._sums or [math.nan] * count + [0.0] * len(_SCORES) * num_scales
        divisor = max(steps, 1)
        terms = {name: total / divisor for name, total in zip(names, sums, strict=False)}
        parts = torch.tensor(sums[count:], dtype=torch.float64).split(num_scales)
        scores = score_report(ScaleScores(**dict(zip(_SCORES, parts, strict=True))))
        grad_norm = self._grad_norm / divisor if steps else math.nan
        self.restart({})
        return {
            "steps": steps,
            "loss": terms.pop("total"),
            **terms,
            **{key: value for key, value in scores.items() if key not in terms},
            "grad_norm": grad_norm,
        }
