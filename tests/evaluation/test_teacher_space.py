"""A teacher as a feature space: what it is given, and which vector is taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as vision

from mepa_ds.evaluation.teacher_space import TeacherSpace
from mepa_ds.teachers.base import Teacher
from tests.evaluation.images import digits


class Pixels(Teacher):
    """Shows its input: cells are mean colours; the CLS token is the whole input's first column."""

    def __init__(self, name: str, with_cls: bool):
        super().__init__(name, 3, grid_side=4, pixels_per_cell=14)
        self._with_cls = with_cls

    @property
    def has_cls(self) -> bool:
        return self._with_cls

    def _features(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
        cells_BNC = torch.nn.functional.avg_pool2d(images_B3HW, 14).flatten(2).transpose(1, 2)
        return cells_BNC, images_B3HW[..., 0].flatten(1)[:, :3] if self._with_cls else None


def as_dgm_eval(pixels_HW3: np.ndarray) -> Tensor:
    """FD-DINOv2's own program resizes a Pillow image, and then makes it a tensor (before ImageNet's normalisation)."""
    return vision.to_tensor(vision.resize(Image.fromarray(pixels_HW3), [56, 56], vision.InterpolationMode.BICUBIC))


@pytest.mark.parametrize("size", [(32, 32), (80, 64), (56, 56)])
def test_the_cls_token_of_images_that_pillow_has_resized(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    pixels_BHW3 = rng.integers(0, 256, (3, *size, 3), dtype=np.uint8)
    space = TeacherSpace(Pixels("shown", with_cls=True), torch.device("cpu"))
    expected = torch.stack([as_dgm_eval(pixels)[..., 0].flatten()[:3] for pixels in pixels_BHW3])
    torch.testing.assert_close((space(pixels_BHW3) + 1) / 2, expected, atol=1e-6, rtol=0)
    assert space.preprocessing == "Pillow bicubic to 56 x 56; CLS token"


def test_without_a_cls_token_the_cells_are_summed_up() -> None:
    pixels_BHW3 = np.ascontiguousarray(digits(0, 40).repeat(2, 1).repeat(2, 2)[:, :56, :56])
    mean, spread = (TeacherSpace(Pixels(name, False), torch.device("cpu")) for name in ("shown", "patch-pca"))
    assert (mean.width, spread.width) == (3, 6)
    cells_BN3 = pixels_BHW3.reshape(40, 4, 14, 4, 14, 3).mean((2, 4)).reshape(40, 16, 3) / 127.5 - 1
    np.testing.assert_allclose(mean(pixels_BHW3), cells_BN3.mean(1), atol=1e-5)
    np.testing.assert_allclose(spread(pixels_BHW3)[:, 3:], cells_BN3.std(1), atol=1e-5)
