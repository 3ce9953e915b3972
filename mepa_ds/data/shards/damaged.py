"""What a loader does about a sample that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from mepa_ds.errors import DamagedError

OnDamaged = Literal["stop", "skip"]
"""Raise an error, or let the next sample that can be read take its place."""
ResultT = TypeVar("ResultT")


def first_readable(read: Callable[[int], ResultT], num_samples: int, directory: Path) -> tuple[ResultT, list[str]]:
    """Calls read(0), read(1), ... up to the first call that meets no damage.

    Returns:
        The result of that call, and the messages of the calls before it.

    Raises:
        DamagedError: all `num_samples` calls met damage.
    """
    errors = list[str]()
    for step in range(num_samples):
        try:
            return read(step), errors
        except DamagedError as error:
            errors.append(str(error))
    raise DamagedError(f"{directory}: no sample of the set can be read; make it again")
