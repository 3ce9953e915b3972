"""A teacher's view of whole images as a feature space.

FD-DINOv2 (arXiv 2306.04675) is `teacher:dinov2-l`: the CLS token of ViT-L/14, of images that Pillow has resized to
224 x 224 (bicubic; images that are not square are squashed), normalised as ImageNet.

Shapes: B images, N cells, C teacher width.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mepa_ds.evaluation.space import PATCH_PCA, FeatureSpace
from mepa_ds.teachers.base import Teacher
from mepa_ds.teachers.registry import build_teacher


class TeacherSpace(FeatureSpace):
    """The CLS token where the teacher has one, else the mean over the cells. Of patch-pca, the mean and the standard
    deviation over the cells: its features are of zero mean over the training images, and what tells images apart is
    as much how their cells differ.
    """

    def __init__(self, teacher: Teacher, device: torch.device):
        self._teacher, self._device = teacher.to(device), device
        self.name, self.identity = teacher.name, teacher.identity
        self._spreads = teacher.name == PATCH_PCA
        self.width = teacher.width * (2 if self._spreads else 1)
        self._side = teacher.grid_side * teacher.pixels_per_cell
        vector = "CLS token" if teacher.has_cls else "mean over cells"
        vector += " and standard deviation over cells" if self._spreads else ""
        self.preprocessing = f"Pillow bicubic to {self._side} x {self._side}; {vector}"

    @classmethod
    def open(cls, name: str, weights: str | None, device: torch.device) -> TeacherSpace:
        """Raises UserError for an unknown teacher, or weights that are missing or unfit."""
        return cls(build_teacher(name, weights), device)

    def _compute(self, pixels_BHW3: NDArray[np.uint8]) -> dict[str, Tensor]:
        resized_BHW3 = np.stack([self._resized(pixels) for pixels in pixels_BHW3])
        images_B3HW = torch.from_numpy(resized_BHW3).to(self._device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        cells_BNC, cls_BC = self._teacher.features(images_B3HW)
        if cls_BC is not None:
            return {self.name: cls_BC}
        mean_BC = cells_BNC.mean(1)
        return {self.name: torch.cat([mean_BC, cells_BNC.std(1, correction=0)], 1) if self._spreads else mean_BC}

    def _resized(self, pixels_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size = (self._side, self._side)
        if pixels_HW3.shape[:2] == size:
            return pixels_HW3
        return np.asarray(Image.fromarray(pixels_HW3).resize(size, Image.Resampling.BICUBIC))
