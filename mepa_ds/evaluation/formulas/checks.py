"""What the formulas are given: matrices of finite numbers, one row an image.

Shapes: N rows, D features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mepa_ds.errors import UserError

Array = NDArray[Any] | Tensor
_ROWS = 4096
LARGEST = 1e20
"""Features beyond this are refused where all scores are asked for: the sums of KID's error have the twelfth power."""


def as_rows(values: Array, what: str, least: int = 1) -> Tensor:
    """(N, D) features as a tensor, of the type and on the device that they have.

    Raises:
        UserError: they are no matrix of real numbers, have fewer than `least` rows or no columns, or a number is not
            finite; `what` begins the message.
    """
    rows_ND = as_numbers(values, what)
    if rows_ND.ndim != 2 or not rows_ND.shape[1]:
        raise UserError(f"{what}: expected features of shape (images, width), got {tuple(rows_ND.shape)}")
    if len(rows_ND) < least:
        raise UserError(f"{what}: {len(rows_ND)} images, but this score needs at least {least}; give more")
    for first in range(0, len(rows_ND), _ROWS):
        finite_N = rows_ND[first : first + _ROWS].isfinite().all(1)
        if not finite_N.all():
            row = first + int(finite_N.logical_not().nonzero()[0])
            raise UserError(f"{what}: image {row} has features that are not finite")
    return rows_ND


def as_pair(first: Array, second: Array, names: tuple[str, str], least: int) -> tuple[Tensor, Tensor]:
    """Two matrices of one width, on the device of the second. Raises UserError as `as_rows`, and for other widths."""
    first_ND, second_MD = as_rows(first, names[0], least), as_rows(second, names[1], least)
    if first_ND.shape[1] != second_MD.shape[1]:
        raise UserError(
            f"{names[0]} and {names[1]}: {first_ND.shape[1]} and {second_MD.shape[1]} features an image; both must "
            "come from the same feature space"
        )
    return first_ND.to(second_MD.device), second_MD


def as_numbers(values: Array, what: str) -> Tensor:
    """A tensor of real numbers. Raises UserError for anything else."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "fiu":
            raise UserError(f"{what}: of type {values.dtype}, expected numbers")
        if values.dtype.kind != "f" or values.dtype.itemsize > 8:
            values = values.astype(np.float64)
        return torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C"))
    if not isinstance(values, Tensor) or values.is_complex() or values.dtype == torch.bool:
        raise UserError(f"{what}: expected an array or a tensor of numbers, got {type(values).__name__}")
    return values.detach()
