"""What a feature space is: a network that gives one vector for each image.

Shapes: B images of a call, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.precision import full_fp32

INCEPTION, TEACHER, PATCH_PCA, CLASSIFIER = "inception", "teacher", "patch-pca", "classifier"
"""Kinds of spaces, as `open_feature_space` names them."""


class FeatureSpace(ABC):
    """`space(pixels)` gives one vector for each image, whatever else is in the call.

    name: in scores and protocols. identity: hash of the weights that the features come from. width: D.
    preprocessing: in words, for protocols. `chunk`: images that go through the network at a time. It is always the
    same number (the last ones are filled up with black images), because other numbers round otherwise.
    """

    name: str
    identity: str
    width: int
    preprocessing: str
    chunk: int = 32

    def __call__(self, pixels_BHW3: NDArray[np.uint8]) -> Tensor:
        """(B, D) float32 on the CPU, of uint8 images of any one size."""
        return self.outputs(pixels_BHW3)[self.name]

    @torch.inference_mode()
    def outputs(self, pixels_BHW3: NDArray[np.uint8]) -> dict[str, Tensor]:
        """The features under the space's name, and what else it gives under `<name>.<what>`; (B, ...) float32 each."""
        parts: list[dict[str, Tensor]] = []
        for first in range(0, len(pixels_BHW3), self.chunk):
            part_BHW3 = pixels_BHW3[first : first + self.chunk]
            count = len(part_BHW3)
            if count < self.chunk:
                filled = np.zeros((self.chunk, *part_BHW3.shape[1:]), np.uint8)
                filled[:count] = part_BHW3
                part_BHW3 = filled
            with full_fp32():  # TF32 moves FID
                # A copy: PyTorch warns of arrays that cannot be written, as those from files are.
                found = self._compute(np.array(part_BHW3, order="C"))
            parts.append({name: values[:count].float().cpu() for name, values in found.items()})
        if not parts:
            return {self.name: torch.empty(0, self.width)}
        return {name: torch.cat([part[name] for part in parts]).clone() for name in parts[0]}

    @abstractmethod
    def _compute(self, pixels_BHW3: NDArray[np.uint8]) -> dict[str, Tensor]:
        """`outputs` of a whole chunk."""

    def facts(self) -> dict[str, object]:
        """What a protocol says of the space."""
        return {"identity": self.identity, "width": self.width, "preprocessing": self.preprocessing}


def check_finite(outputs: dict[str, Tensor], what: str, first: int) -> None:
    """Raises UserError for features of a network that are not finite, with the number of the image.

    Args:
        what, first: name of the set of images, and the number of the first of these.
    """
    for name, values in outputs.items():
        finite_B = values.isfinite().all(1)
        if not finite_B.all():
            number = first + int(finite_B.logical_not().nonzero()[0])
            raise UserError(
                f"{what}: image {number} has features ({name}) that are not finite; the network's weights are "
                "damaged, or not those that belong to it"
            )
