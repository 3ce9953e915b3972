"""A teacher that needs no download: whitened PCA of local image patches, fitted on the training images.

Its features describe texture and shape around each cell, but not what the image shows. It lets the whole pipeline run
on any images, and is a baseline that a real teacher (DINOv2) has to beat.

Shape legend: B batch, H image height, W image width, N cells (row-major), D pixels of a window (3 * window**2),
C teacher width (principal components).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from mepa_ds.config.base import Section
from mepa_ds.config.values import PositiveInt
from mepa_ds.teachers.base import Teacher, resize
from mepa_ds.teachers.pca import RunningCovariance
from mepa_ds.weights.directories import load_strict, read_pretrained, save_pretrained
from mepa_ds.weights.file_checks import check_fits

KIND = "patch-pca"


class PatchPcaConfig(Section):
    """Stored as `config.json` beside the basis."""

    grid_side: PositiveInt = 16
    """Cells along one side of an image."""
    pixels_per_cell: PositiveInt = 8
    """Images are resized so that a cell has this many pixels along one side."""
    window: PositiveInt = 16
    """Side, in pixels, of the square window that a cell looks at; wider than a cell, neighbours overlap."""
    width: PositiveInt = 64
    """C, the number of principal components."""
    whitening_floor: Annotated[float, Field(gt=0)] = 0.01
    """Components are divided by sqrt(variance + floor * largest variance): 0.01 damps what is below a hundredth of the
    first, so that noise is not blown up to the size of structure. No option sets it; the stored config names it, so
    that it says all that the features depend on."""
    fitted_on: str = ""
    """The images it was fitted on, as the fitting tool names them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.window < self.pixels_per_cell or (self.window - self.pixels_per_cell) % 2:
            raise ValueError(
                f"window must be pixels_per_cell ({self.pixels_per_cell}) plus an even number of pixels, "
                f"so that a cell lies in its middle; got {self.window}"
            )
        if self.window > self.grid_side * self.pixels_per_cell:
            raise ValueError(
                f"window ({self.window} px) is larger than the image ({self.grid_side} cells of "
                f"{self.pixels_per_cell} px)"
            )
        if self.width > 3 * self.window**2:
            raise ValueError(f"width must be at most 3 * window**2 = {3 * self.window**2}, got {self.width}")
        return self


class PatchPca(Teacher):
    """features_n = (window_n - mean) @ projection, in whitened principal components."""

    mean: Tensor  # (D,)
    projection: Tensor  # (D, C)

    def __init__(self, config: PatchPcaConfig, name: str = KIND):
        super().__init__(name, config.width, config.grid_side, config.pixels_per_cell)
        self.config = config
        dimensions = 3 * config.window**2
        self.register_buffer("mean", torch.zeros(dimensions))
        self.register_buffer("projection", torch.zeros(dimensions, config.width))

    @classmethod
    def fit(cls, batches_B3HW: Iterable[Tensor], config: PatchPcaConfig) -> PatchPca:
        """Fits on batches of images (B, 3, H, W) in [-1, 1]. The same images in the same order give the same
        weights, to the bit with the same number of threads.

        Raises UserError when the images hold fewer cells than components.
        """
        covariance = RunningCovariance(3 * config.window**2)
        side = config.grid_side * config.pixels_per_cell
        for images_B3HW in batches_B3HW:
            covariance.add(_windows(resize(images_B3HW.float(), (side, side)), config).flatten(0, 1))
        mean_D, components_CD, variances_C = covariance.principal_components(config.width)
        teacher = cls(config)
        gains_C = (variances_C + config.whitening_floor * variances_C[0]).rsqrt()
        teacher.mean.copy_(mean_D)
        teacher.projection.copy_((components_CD * gains_C[:, None]).T)
        return teacher.freeze()

    def save(self, directory: Path) -> None:
        save_pretrained(directory, self.config, self.state_dict(), KIND)

    @classmethod
    def load(cls, directory: Path, name: str = KIND) -> PatchPca:
        """Reads what `save` wrote. Raises UserError for anything else."""
        config, state = read_pretrained(directory, PatchPcaConfig, KIND)
        check_fits(lambda: cls(config), state, str(directory))
        teacher = cls(config, name)
        load_strict(teacher, state, str(directory))
        return teacher.freeze()

    def _features(self, images_B3HW: Tensor) -> tuple[Tensor, None]:
        return (_windows(images_B3HW, self.config) - self.mean) @ self.projection, None


def _windows(images_B3HW: Tensor, config: PatchPcaConfig) -> Tensor:
    """(B, N, D): the window around each cell; beyond the border the image is mirrored."""
    margin = (config.window - config.pixels_per_cell) // 2
    padded = F.pad(images_B3HW, (margin,) * 4, mode="reflect") if margin else images_B3HW
    return F.unfold(padded, config.window, stride=config.pixels_per_cell).transpose(1, 2)
