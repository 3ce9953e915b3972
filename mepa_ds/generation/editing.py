"""Parts of a given image that sampling keeps: in-painting, out-painting, class-conditional edits and variations.

Shapes: B images, L tokens over all scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.scales import ScaleSchedule

_TOO_FEW = 3
"""Scales of at most so many tokens say nothing of places: an edit keeps them whole, as VAR's does."""


@dataclass(frozen=True)
class Given:
    """Tokens of an image (`Tokenizer.encode`), and which of them stay. All others are drawn."""

    tokens_BL: Tensor
    """One image for each label, or one for all of them (1, L)."""
    keep_L: Tensor
    """Booleans."""


def keep_outside(repaint_HW: Tensor | NDArray[np.bool_], schedule: ScaleSchedule) -> Tensor:
    """(L,) booleans: the tokens to keep when a part of the image is painted anew.

    VAR's zero-shot editing: the mask of what stays is resized to each scale (bilinear), and a token stays where it is
    above one half. Scales of at most three tokens stay whole.

    Args:
        repaint_HW: True where the image is to change; a square of any side.

    Raises:
        UserError: it is no square of booleans, or nothing of it changes.
    """
    mask = torch.as_tensor(repaint_HW)
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or not len(mask) or mask.dtype != torch.bool:
        raise UserError(f"mask: expected a square of booleans, got {mask.dtype} of shape {tuple(mask.shape)}")
    if not mask.any():
        raise UserError("mask: nothing of it is to change; mark the part that is to be painted anew")
    stays_11HW = (~mask).float()[None, None]
    keep = []
    for side in schedule.sides:
        if side * side <= _TOO_FEW:
            keep.append(torch.ones(side * side, dtype=torch.bool))
        else:
            resized = F.interpolate(stays_11HW, size=(side, side), mode="bilinear", align_corners=False)
            keep.append((resized > 0.5).flatten())
    return torch.cat(keep)


def keep_scales(count: int, schedule: ScaleSchedule) -> Tensor:
    """(L,) booleans: the tokens of the first `count` scales. What is drawn then is a variation of the image.

    Raises:
        UserError: `count` is none of 1..S-1.
    """
    is_whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
    if not is_whole or not 1 <= count < schedule.num_scales:
        raise UserError(f"scales to keep: expected 1..{schedule.num_scales - 1}, got {count}")
    return torch.arange(schedule.num_tokens) < schedule.bounds[count - 1][1]


def checked(given: Given, num_images: int, schedule: ScaleSchedule, codebook_size: int) -> Given:
    """The same with a row of tokens for each image. Raises UserError for what does not fit the model."""
    if not isinstance(given, Given):
        raise UserError(
            f"given: expected Given(tokens, keep) of mepa_ds.generation.editing, got {type(given).__name__}"
        )
    tokens_BL, keep_L = torch.as_tensor(given.tokens_BL), torch.as_tensor(given.keep_L)
    L = schedule.num_tokens
    if tokens_BL.ndim != 2 or tokens_BL.shape[1] != L or len(tokens_BL) not in (1, num_images):
        raise UserError(
            f"given: tokens have shape {tuple(tokens_BL.shape)}, expected (1 or {num_images}, {L}) for scales "
            f"{list(schedule.sides)}"
        )
    if tokens_BL.is_floating_point() or tokens_BL.dtype == torch.bool:
        raise UserError(f"given: expected tokens of an integer type, got {tokens_BL.dtype}")
    if tokens_BL.numel() and not 0 <= int(tokens_BL.min()) <= int(tokens_BL.max()) < codebook_size:
        raise UserError(f"given: expected tokens of 0..{codebook_size - 1}, the codebook's")
    if keep_L.shape != (L,) or keep_L.dtype != torch.bool:
        raise UserError(f"given: expected {L} booleans of what stays, got {keep_L.dtype} of {tuple(keep_L.shape)}")
    return Given(tokens_BL.to(torch.int64).expand(num_images, L), keep_L)
