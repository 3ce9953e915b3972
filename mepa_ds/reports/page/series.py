"""Long series made short for a chart: bins that keep every extreme, a running mean, and the noise of single records.

Shapes: N records, P bins (points of a chart).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mepa_ds.reports.records import Column

ItemT = TypeVar("ItemT")

WINDOW_SHARE = 50
"""The running mean is over a fiftieth of the records."""
_Z = 1.96
_BLOCKS, _BLOCK_LEAST, _LEAST = 40, 12, 13
_MAD = 1.4826  # a normal deviation in median absolute deviations


@dataclass(frozen=True)
class Binned:
    """A series of P points.

    Attributes:
        low, high: (P,) the smallest and the largest finite value of each bin; NaN where it has none.
        line: (P,) the running mean at each bin's middle record.
        noise: (P,) half the width of a band around the line in which 95 % of single records lie; None where there are
            too few records to tell.
    """

    low: Column
    high: Column
    line: Column
    noise: Column | None

    def as_json(self, noise: bool = True) -> dict[str, Any]:
        found: dict[str, Any] = {"line": rounded(self.line), "low": rounded(self.low)}
        if not np.array_equal(self.low, self.high, equal_nan=True):
            found["high"] = rounded(self.high)
        if noise and self.noise is not None and (self.noise > 0).any():
            found["noise"] = rounded(self.noise, 3)
        return found


def bin_edges(count: int, most: int) -> NDArray[np.int64]:
    """Returns (P + 1,) edges that cut `count` records into at most `most` bins of about the same size, P <= count."""
    return np.linspace(0, count, min(count, most) + 1).round().astype(np.int64)


def middles(edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns (P,) the record that stands for each bin."""
    return (edges[:-1] + edges[1:] - 1) // 2


def binned(values_N: Column, edges: NDArray[np.int64]) -> Binned:
    """Bins a series. Values that are not finite count nowhere."""
    finite_N = np.isfinite(values_N)
    starts = edges[:-1]
    low = np.minimum.reduceat(np.where(finite_N, values_N, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite_N, values_N, -np.inf), starts)
    low[~np.isfinite(low)] = high[~np.isfinite(high)] = np.nan
    at = middles(edges)
    noise = noise_of(values_N)
    return Binned(low, high, running_mean(values_N)[at], None if noise is None else _Z * noise[at])


def running_mean(values_N: Column) -> Column:
    """Returns (N,) means over a window of a fiftieth of the records around each one, narrower towards both ends.

    NaN where no value of the window is finite.
    """
    count = len(values_N)
    finite_N = np.isfinite(values_N)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite_N, values_N, 0.0))])
    numbers = np.concatenate([[0], np.cumsum(finite_N)])
    index = np.arange(count)
    half = np.minimum(np.minimum(index, count - 1 - index), max(count // WINDOW_SHARE, 1) // 2)
    first, last = index - half, index + half + 1
    found = numbers[last] - numbers[first]
    return np.where(found > 0, (sums[last] - sums[first]) / np.maximum(found, 1), np.nan)


def noise_of(values_N: Column) -> Column | None:
    """Returns (N,) the standard deviation of single records about their trend, or None for fewer than 13 records.

    It is that of differences of records one after another, which a slow trend does not touch, over sqrt(2); by medians,
    so that a spike does not count; in up to 40 stretches of the run, with values between them interpolated.
    """
    finite = np.flatnonzero(np.isfinite(values_N))
    if len(finite) < _LEAST:
        return None
    steps = np.diff(values_N[finite])
    blocks = np.array_split(np.arange(len(steps)), max(min(_BLOCKS, len(steps) // _BLOCK_LEAST), 1))
    centres, deviations = [], []
    for block in blocks:
        inside = steps[block]
        deviations.append(_MAD * float(np.median(np.abs(inside - np.median(inside)))) / np.sqrt(2))
        centres.append(float(finite[block].mean()))
    return np.interp(np.arange(len(values_N)), centres, deviations)


def final_value(values_N: Column) -> tuple[float, float | None]:
    """Returns the mean of the last fiftieth of the records (at least one), and half its 95 % interval by noise."""
    tail = values_N[-max(len(values_N) // WINDOW_SHARE, 1) :]
    tail = tail[np.isfinite(tail)]
    if not len(tail):
        return float("nan"), None
    noise = noise_of(values_N)
    return float(tail.mean()), None if noise is None else _Z * float(noise[-1]) / len(tail) ** 0.5


def spread(items: Sequence[ItemT], most: int) -> list[ItemT]:
    """Returns at most `most` of the items, evenly spread, the first and the last among them (one: the last)."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[-1]]
    return [items[round(number)] for number in np.linspace(0, len(items) - 1, most)]


def rounded(values: Column, digits: int = 5) -> list[float | int | None]:
    """Returns numbers of so many significant digits for JSON; None for what is not finite."""
    return [None if not np.isfinite(value) else _short(value, digits) for value in values.tolist()]


def _short(value: float, digits: int) -> float | int:
    short = float(f"{value:.{digits}g}")
    return int(short) if short == int(short) and abs(short) < 1e15 else short
