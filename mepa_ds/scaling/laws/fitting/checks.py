"""What a fit refuses: inputs from which no number can honestly be made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mepa_ds.errors import UserError

Array = NDArray[np.float64]
MAX_CORRELATION = 0.995
"""Of log N and log D: above, the two terms of a law cannot be told apart."""
SAME_SIZE = 0.005
"""Sizes whose logarithms differ by less are one size."""


def numbers(law: str, columns: Mapping[str, ArrayLike]) -> dict[str, Array]:
    """The columns as float64 (N,), each finite and positive, all of one length.

    Raises:
        UserError: names the column, the rows and what is wrong with them.
    """
    result: dict[str, Array] = {}
    for name, values in columns.items():
        try:
            column = np.asarray(values)
            if column.dtype == bool:
                raise TypeError
            column = column.astype(np.float64)
        except (TypeError, ValueError):
            raise UserError(f"{law}: {name}: not numbers; give a one-dimensional array of numbers") from None
        if column.ndim != 1:
            raise UserError(f"{law}: {name}: an array of shape {np.shape(values)}; give one number a run")
        for bad, what in ((~np.isfinite(column), "NaN or infinite"), (~(column > 0), "not above 0")):
            if bad.any():
                raise UserError(
                    f"{law}: {name}: {_rows(bad)} {what} (the first is {column[bad][0]:g}); leave these runs out"
                )
        result[name] = column
    lengths = {name: len(column) for name, column in result.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UserError(f"{law}: columns of different lengths ({told}); give one number a run in each")
    return result


def _rows(bad: NDArray[np.bool_]) -> str:
    rows = np.flatnonzero(bad)
    told = ", ".join(str(row) for row in rows[:5])
    return f"row {told} is" if len(rows) == 1 else f"rows {told}{', ...' if len(rows) > 5 else ''} are"


def check_points(law: str, num_rows: int, needed: int, why: str) -> None:
    """Raises UserError where the law needs more runs than there are."""
    if num_rows < needed:
        raise UserError(f"{law}: {num_rows} runs, but the law needs at least {needed} ({why}); add runs")


def num_sizes(values: Array) -> int:
    """How many sizes there are, where values within 0.5 % of each other are one."""
    return int(size_groups(values).max()) + 1 if len(values) else 0


def size_groups(values: Array) -> NDArray[np.intp]:
    """The number (N,) of each row's size, in ascending order."""
    order = np.argsort(values, kind="stable")
    groups = np.empty(len(values), np.intp)
    groups[order] = np.concatenate([[0], np.cumsum(np.diff(np.log(values[order])) > SAME_SIZE)])
    return groups


def check_sizes(law: str, columns: Mapping[str, Array], needed: int) -> None:
    """Raises UserError where a column has fewer different values than its term has unknowns."""
    for name, values in columns.items():
        count = num_sizes(values)
        if count < needed:
            found = "one size only" if count == 1 else f"only {count} different values"
            raise UserError(
                f"{law}: {name}: {found}, but its exponent needs at least {needed}; add runs of other sizes, or pin E"
            )


def collinearity(N: ArrayLike, D: ArrayLike) -> float:
    """|correlation| of log N and log D, in [0, 1]; 1 where one of them does not vary.

    Fits of laws with a term of each refuse above `MAX_CORRELATION` = 0.995: a ladder of 20 images a weight, or one
    FLOP budget, has 1.
    """
    x, y = (np.log(np.asarray(values, np.float64)) for values in (N, D))
    x, y = x - x.mean(), y - y.mean()
    norms = float(np.sqrt((x @ x) * (y @ y)))
    return min(1.0, abs(float(x @ y)) / norms) if norms > 1e-18 * max(len(x), 1) else 1.0


def check_not_collinear(law: str, N: Array, D: Array) -> None:
    """Raises UserError where N and D grow together, so that their exponents cannot be told apart."""
    found = collinearity(N, D)
    if found > MAX_CORRELATION:
        raise UserError(
            f"{law}: log N and log D are collinear (correlation {found:.4f}, allowed up to {MAX_CORRELATION}): their "
            "exponents cannot be told apart; add runs of one size at several lengths"
        )


def check_units(law: str, N: Array, D: Array) -> None:
    """Raises UserError where N and D cannot be in the units of one table."""
    for small, large, names in ((N, D, ("N", "D")), (D, N, ("D", "N"))):
        if small.max() < 1e3 and large.max() > 1e12:
            raise UserError(
                f"{law}: {names[0]} is at most {small.max():g} while {names[1]} reaches {large.max():g}: these units "
                "cannot be; give weights and tokens as plain counts"
            )


def labels(law: str, cluster: Any, num_rows: int) -> NDArray[np.intp]:
    """Clusters (any labels, one a row) as numbers by first appearance; None: each row is its own.

    Raises:
        UserError: not one label a run.
    """
    if cluster is None:
        return np.arange(num_rows)
    given = [str(label) for label in np.asarray(cluster).ravel()]
    if len(given) != num_rows:
        raise UserError(f"{law}: cluster: {len(given)} labels for {num_rows} runs; give one a run")
    numbers_of: dict[str, int] = {}
    return np.array([numbers_of.setdefault(label, len(numbers_of)) for label in given], np.intp)
