"""The scale schedule: which token maps make up an image, and where each lies in the token sequence.

Shape legend (the whole project): B batch, L tokens over all scales, S scales, C width, V codebook size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from mepa_ds.errors import UserError

MOST_SIDE = 1024
"""Of a token map: an image of 16384 pixels a side, by VAR's tokenizer."""
MOST_SCALES = 256


@dataclass(frozen=True)
class ScaleSchedule:
    """Sides of the square token maps, coarse to fine (VAR's `patch_nums`).

    VAR-256 uses (1, 2, 3, 4, 5, 6, 8, 10, 13, 16): 680 tokens. Tokens of one image are laid out scale after
    scale, each map in row-major order.
    """

    sides: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sides or any(side < 1 for side in self.sides):
            raise UserError(f"scales: expected positive sides such as 1,2,3,4, got {str(list(self.sides))[:200]}")
        if len(self.sides) > MOST_SCALES or max(self.sides) > MOST_SIDE:
            raise UserError(
                f"scales: expected at most {MOST_SCALES} sides up to {MOST_SIDE}, got {len(self.sides)} up to "
                f"{str(max(self.sides))[:20]}"
            )
        if any(a >= b for a, b in zip(self.sides, self.sides[1:], strict=False)):
            raise UserError(f"scales: sides must grow from coarse to fine, got {list(self.sides)}")

    @classmethod
    def of(cls, sides: Sequence[int]) -> ScaleSchedule:
        return cls(tuple(sides))

    @property
    def num_scales(self) -> int:
        return len(self.sides)

    @property
    def grid_side(self) -> int:
        """Side of the finest map, which is the latent grid's side."""
        return self.sides[-1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(side * side for side in self.sides)

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of each scale in the sequence of L tokens."""
        ends = accumulate(self.lengths)
        return tuple((end - length, end) for end, length in zip(ends, self.lengths, strict=True))

    @property
    def num_tokens(self) -> int:
        """L, the length of the sequence over all scales."""
        return self.bounds[-1][1]

    def split(self, x_BL: Tensor) -> list[Tensor]:
        """Views of (B, L, ...) by scale."""
        return list(x_BL.split(self.lengths, dim=1))

    def scale_index_L(self, device: torch.device | str | None = None) -> Tensor:
        """(L,) int64: the 0-based scale of every position."""
        # Made on the device: a copy from the host would wait for all that is queued there.
        return torch.cat([torch.full((length,), scale, device=device) for scale, length in enumerate(self.lengths)])


def bicubic_matrix(side: int, grid_side: int, device: torch.device | str | None = None) -> Tensor:
    """The matrix that enlarges a map bicubically: (G G, s s) fp32, for maps flattened in row-major order.

    A product with it equals `F.interpolate(mode="bicubic")` to rounding (1e-6 of the largest value). PyTorch's kernel
    goes over all images and channels within each thread, so on a GPU a 16 x 16 map keeps one block busy, and its
    gradient adds atomically. The enlargement along one axis, applied to rows and columns, gives the whole matrix.
    """
    # Made anew for each call, on the device: a cached tensor would have to know device and tracing mode, and a copy
    # from the host would wait for all that is queued there.
    rows_Ss = torch.eye(side, device=device)[None, None]
    if side != grid_side:
        rows_Ss = F.interpolate(rows_Ss, size=(grid_side, side), mode="bicubic")
    return torch.kron(rows_Ss[0, 0], rows_Ss[0, 0])


def parse_sides(words: Sequence[str]) -> tuple[int, ...]:
    """The sides after `--scales` on a command line: `1 2 3 4` or `1,2,3,4`.

    Raises:
        UserError: no whole numbers.
    """
    parts = [part for part in re.split(r"[,\s]+", " ".join(words)) if part]
    if not parts or not all(part.isascii() and part.isdecimal() for part in parts):
        raise UserError(f"expected sides such as 1 2 3 4, or 1,2,3,4; got {' '.join(words)!r}")
    return tuple(map(int, parts))
