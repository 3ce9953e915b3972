"""Fragments, of which checkpoints are made. To import `store`, which writes them, takes a second; this takes none."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# The kinds of tensors that are kept for every parameter: the fp32 master, Adam's moments, and the average of the
# masters (if the recipe wants one). BUFFER is the kind of the model's buffers.
MASTER, EXP_AVG, EXP_AVG_SQ, EMA, BUFFER = "master", "exp_avg", "exp_avg_sq", "ema", "buffer"


@dataclass(frozen=True)
class Fragment:
    """Elements [offset, offset + len(data)) of the flattened tensor `name` ("kind/parameter") of `numel` elements."""

    name: str
    numel: int
    offset: int
    data: Tensor


class WriteError(Exception):
    """Fragments could not be written on some rank; the message names it. Raised on all ranks."""
