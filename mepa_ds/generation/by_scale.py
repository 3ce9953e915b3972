"""Settings of sampling that may differ from scale to scale: guidance, temperature, top-k, top-p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np

from mepa_ds.errors import UserError

CfgSchedule = Literal["linear", "constant"]


@dataclass(frozen=True)
class ByScale:
    """A value for each of S scales, the coarsest first."""

    cfg_S: tuple[float, ...]
    """Weights t of guidance: logits are (1 + t) conditional - t unconditional."""
    temperature_S: tuple[float, ...]
    top_k_S: tuple[int, ...]
    top_p_S: tuple[float, ...]

    def ratio(self, scale: int) -> float:
        """The place of a scale in 0..1."""
        return scale / max(len(self.cfg_S) - 1, 1)


def by_scale(
    num_scales: int,
    cfg: float | Sequence[float],
    cfg_schedule: CfgSchedule,
    guided_scales: tuple[int, int] | None,
    temperature: float | Sequence[float],
    top_k: int | Sequence[int],
    top_p: float | Sequence[float],
) -> ByScale:
    """Checks the settings of `sample` and spreads them over the scales.

    Raises:
        UserError: a value out of its range, or a sequence of another length than the schedule.
    """
    if cfg_schedule not in get_args(CfgSchedule):
        raise UserError(f"cfg_schedule: expected one of {', '.join(get_args(CfgSchedule))}, got {cfg_schedule!r}")
    weights = [float(t) for t in _spread(cfg, num_scales, "cfg", _is_number, "a finite number such as 1.5")]
    if cfg_schedule == "linear" and not _is_sequence(cfg):
        weights = [t * (scale / max(num_scales - 1, 1)) for scale, t in enumerate(weights)]
    first, last = _interval(guided_scales, num_scales)
    temperatures = _spread(temperature, num_scales, "temperature", _is_positive, "a finite number above 0, such as 1")
    return ByScale(
        cfg_S=tuple(t if first <= scale <= last else 0.0 for scale, t in enumerate(weights, start=1)),
        temperature_S=tuple(map(float, temperatures)),
        top_k_S=tuple(map(int, _spread(top_k, num_scales, "top_k", _is_count, "a whole number of at least 0"))),
        top_p_S=tuple(map(float, _spread(top_p, num_scales, "top_p", _is_share, "a number in 0..1"))),
    )


def _interval(guided_scales: tuple[int, int] | None, num_scales: int) -> tuple[int, int]:
    if guided_scales is None:
        return 1, num_scales
    whole = _is_sequence(guided_scales) and len(guided_scales) == 2 and all(map(_is_count, guided_scales))
    if not whole or not 1 <= guided_scales[0] <= guided_scales[1] <= num_scales:
        raise UserError(
            f"guided_scales: expected the first and the last guided scale, 1..{num_scales}, got {guided_scales!r}"
        )
    return guided_scales


def _spread(value: Any, num_scales: int, name: str, is_valid: Any, expected: str) -> list[Any]:
    values = list(value) if _is_sequence(value) else [value] * num_scales
    if len(values) != num_scales:
        raise UserError(f"{name}: has {len(values)} values, the model {num_scales} scales; give one, or one for each")
    for given in values:
        if not is_valid(given):
            raise UserError(f"{name}: expected {expected}, got {given!r}")
    return values


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray))


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and bool(value > 0)


def _is_share(value: Any) -> bool:
    return _is_number(value) and bool(0 <= value <= 1)


def _is_count(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, np.integer)) and bool(value >= 0)
