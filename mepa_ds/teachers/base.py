"""The interface of teachers: frozen networks that give one feature vector for each cell of a grid over an image.

Shape legend: B batch, H image height, W image width, N cells of the grid (row-major), C teacher width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from mepa_ds.files import identity_of_weights
from mepa_ds.images.pictures import check_floats

Grid = tuple[int, int]


class Teacher(nn.Module, ABC):
    """Frozen and always in evaluation mode; subclasses implement `_features`.

    name: its name in shard sets and recipes. width: C. grid_side: cells along one side for a square image.
    pixels_per_cell: side of a cell in the teacher's own input.
    """

    def __init__(self, name: str, width: int, grid_side: int, pixels_per_cell: int):
        super().__init__()
        self.name = name
        self.width = width
        self.grid_side = grid_side
        self.pixels_per_cell = pixels_per_cell
        self.identity = ""
        """Hash of the loaded weights, by which shard sets and runs are compared."""

    @property
    def has_cls(self) -> bool:
        return False

    def patch_features(self, images_B3HW: Tensor, grid: Grid | None = None) -> Tensor:
        """Features (B, N, C) float32 of images in [-1, 1] of any size; N = grid_side**2, or rows * columns of `grid`.

        Images are resized to the teacher's input for that grid. Runs without gradient, under the caller's autocast;
        the result is an ordinary tensor that a loss may save for its backward (online use).
        """
        return self.features(images_B3HW, grid)[0]

    def features(self, images_B3HW: Tensor, grid: Grid | None = None) -> tuple[Tensor, Tensor | None]:
        """(patch features (B, N, C), CLS token (B, C) or None where the teacher has none), float32.

        Raises:
            UserError: images that are not floats.
        """
        check_floats(images_B3HW)
        rows, columns = grid or (self.grid_side, self.grid_side)
        size = (rows * self.pixels_per_cell, columns * self.pixels_per_cell)
        with torch.no_grad():
            patches_BNC, cls_BC = self._features(resize(images_B3HW.float(), size))
        assert patches_BNC.shape[1:] == (rows * columns, self.width), patches_BNC.shape
        return patches_BNC.float(), None if cls_BC is None else cls_BC.float()

    @abstractmethod
    def _features(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of images in [-1, 1] whose sides are multiples of `pixels_per_cell`."""

    def freeze(self) -> Self:
        """Turns gradients off and evaluation mode on, and computes the identity. Called once the weights are loaded."""
        self.identity = identity_of_weights(self.state_dict())
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: a student that holds its teacher may call `train()` on both."""
        return super().train(False)


def resize(images_B3HW: Tensor, size: Grid) -> Tensor:
    """Bicubic with antialiasing, as the teachers were trained with; overshoot is clipped as an image library does."""
    if tuple(images_B3HW.shape[-2:]) == size:
        return images_B3HW
    return F.interpolate(images_B3HW, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
