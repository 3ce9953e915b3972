"""`mepa scale predict`: the best model of a real family for a budget, by a fitted law and counted FLOPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mepa_ds.errors import UserError
from mepa_ds.scaling.candidates import FamilyModel
from mepa_ds.scaling.laws import Fit

CHOOSING_LAWS = ("chinchilla", "data", "joint-moe")
"""Laws that say what a size and a length give, so that they can choose between sizes of one budget."""
MANY_EPOCHS = 4.0
"""Repeats of the data up to here are worth nearly as much as new data (arXiv 2305.16264, section 6)."""


@dataclass(frozen=True)
class Candidate:
    """A model with the length that the budget pays for, and what the law says of it."""

    model: FamilyModel
    images: int
    steps: int | None
    tokens: int
    flops: float
    epochs: float | None
    loss: float
    interval: tuple[float, float] | None
    """95 % interval of the loss of one run."""
    share_best: float | None
    """Share of the bootstrap's draws in which this is the best candidate."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, those of the model among the others."""
        values = dataclasses.asdict(self)
        return {**values.pop("model"), **values}


@dataclass(frozen=True)
class Prediction:
    """Candidates in the order of their sizes, the best of them, and sentences to read before believing it."""

    law: str
    flops: float
    candidates: tuple[Candidate, ...]
    best: Candidate
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "law": self.law,
            "flops": self.flops,
            "best": self.best.model.size,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "warnings": list(self.warnings),
        }


def predict(
    law: Fit, inputs: Sequence[str], models: Sequence[FamilyModel], flops: float, unique_images: int | None = None
) -> Prediction:
    """Finds the model of least loss among `models`, each trained for as many images as `flops` pay for.

    Args:
        law: a fit whose inputs are known for a model before it is trained.
        inputs: the column of the study's table that each of them is.
        models: the family.
        flops: model FLOPs of the whole run, above 0.
        unique_images: of the training set; None: unknown.

    Raises:
        UserError: a budget that pays for no step of any model, a law that cannot choose, an input that no model has.
    """
    if law.law not in CHOOSING_LAWS:
        raise UserError(
            f"--law {law.law}: does not say what a size and a length give; choose one of {', '.join(CHOOSING_LAWS)}"
        )
    if not (np.isfinite(flops) and flops > 0):
        raise UserError(f"--flops {flops}: expected a number above 0")
    lengths = [(model, _images(model, flops)) for model in models]
    paid = [(model, images) for model, images in lengths if images > 0]
    if not paid:
        cheapest = min((model.image_flops * (model.batch or 1) for model in models), default=0.0)
        raise UserError(
            f"--flops {flops:.3g}: pays for no step of any of the {len(models)} sizes; a step of the cheapest costs "
            f"{cheapest:.3g} FLOPs"
        )
    columns = [np.array([_input(name, *pair, unique_images) for pair in paid], float) for name in inputs]
    losses = np.atleast_1d(law.predict(*columns))
    ends = np.array(law.predict_interval(*columns)) if law.draws else None
    shares = _shares_best(law, columns)
    candidates = []
    for k, (model, images) in enumerate(paid):
        candidates.append(
            Candidate(
                model=model,
                images=images,
                steps=None if model.batch is None else images // model.batch,
                tokens=images * model.image_tokens,
                flops=images * model.image_flops,
                epochs=None if unique_images is None else images / unique_images,
                loss=float(losses[k]),
                interval=None if ends is None else (float(ends[0][k]), float(ends[1][k])),
                share_best=None if shares is None else float(shares[k]),
            )
        )
    at = int(np.argmin(losses))
    place = {name: float(column[at]) for name, column in zip(law.input_names, columns, strict=True)}
    told = [*_of_law(law, place), *_of_best(law, candidates, at, len(models) - len(paid))]
    return Prediction(law.law, flops, tuple(candidates), candidates[at], tuple(told))


def _images(model: FamilyModel, flops: float) -> int:
    """Images that the budget pays for; whole steps where the batch is known."""
    unit = model.batch or 1
    return int(flops // (model.image_flops * unit)) * unit


def _input(name: str, model: FamilyModel, images: int, unique_images: int | None) -> float:
    tokens = images * model.image_tokens
    if name == "unique_tokens" and unique_images is None:
        raise UserError("the law is of repeated data, so it needs the size of the training set: give --unique-images")
    known: dict[str, float | None] = {
        "params_matrix": model.params_matrix,
        "params_active": model.params_active,
        "params_total": model.params_total,
        "tokens": tokens,
        "samples": images,
        "flops_model": images * model.image_flops,
        "E": model.experts,
        "experts": model.experts,
        "unique_tokens": None if unique_images is None else unique_images * model.image_tokens,
        "unique_images": unique_images,
    }
    value = known.get(name)
    if value is None:
        names = ", ".join(known)
        raise UserError(
            f"the law was fitted to the column {name!r}, which no model has before it is trained; predictions need a "
            f"law of these: {names}"
        )
    return value


def _shares_best(law: Fit, columns: Sequence[Any]) -> Any:
    """Of each candidate, in which share of the bootstrap's draws it has the least loss. None without a bootstrap."""
    if not law.draws:
        return None
    drawn = {name: np.asarray(law.draws[name])[:, None] for name in law.parameter_names}
    centre = np.log(law.predict(*columns))
    with np.errstate(all="ignore"):
        spread = law.inflation * (np.log(law.formula(drawn, *(column[None] for column in columns))) - centre)
    best = np.argmin(centre + np.where(np.isnan(spread), 0.0, spread), axis=1)
    return np.bincount(best, minlength=len(columns[0])) / len(best)


def _of_law(law: Fit, place: Mapping[str, float]) -> Iterator[str]:
    if not law.draws:
        yield f"The law {law.law} was fitted without a bootstrap, so there is no interval; fit it with --draws 1000."
    for name, value in place.items():
        low, high = law.ranges[name]
        if not low <= value <= high:
            far = value / high if value > high else low / value
            side = "above" if value > high else "below"
            yield (
                f"{name} = {value:.3g} of the best size lies {far:.3g} times {side} the sampled range, {low:.3g} to "
                f"{high:.3g}: this is an extrapolation."
            )
    yield from law.flags


def _of_best(law: Fit, candidates: Sequence[Candidate], at: int, unpaid: int) -> Iterator[str]:
    best = candidates[at]
    ordered = sorted(candidates, key=lambda candidate: candidate.model.image_flops)
    if len(ordered) > 1 and best is ordered[-1] and not unpaid:
        yield f"{best.model.size} is the largest of the sizes: a larger one may be better still; give --sizes."
    if len(ordered) > 1 and best is ordered[0]:
        yield f"{best.model.size} is the smallest of the sizes: a smaller one may be better still; give --sizes."
    if unpaid:
        yield f"{unpaid} sizes are left out: the budget does not pay for one step of them."
    if best.epochs is not None and best.epochs > MANY_EPOCHS and law.law != "data":
        yield (
            f"Each image would be seen {best.epochs:.3g} times, and the law {law.law} takes every token for a new one; "
            "beyond about 4 times they are worth less and less (arXiv 2305.16264): fit --law data."
        )
    if best.model.experts > 1 and law.law in ("chinchilla", "power", "data"):
        yield f"The law {law.law} knows of no experts; unless it was fitted to such runs, use --law joint-moe."
