"""Spaces in which images are compared: a network's features, or features that the user has computed.

Shapes: B images of a call, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.precision import full_fp32

INCEPTION, TEACHER, PATCH_PCA, CLASSIFIER = "inception", "teacher", "patch-pca", "classifier"
KNOWN = (
    "inception, teacher:NAME[:WEIGHTS], patch-pca:DIR, classifier:DIR, or SAMPLES.npy:REFERENCE.npy (features that you "
    "have computed, one row an image)"
)


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
        """(B, D) float32 on the CPU, of uint8 images of any one size.

        Raises:
            UserError: features that are not finite.
        """
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
                found = self._compute(np.ascontiguousarray(part_BHW3))
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


class StoredFeatures(FeatureSpace):
    """Features in two .npy files, one row an image: of the samples, and of the reference."""

    def __init__(self, samples: Path, reference: Path):
        self.samples_ND, self.reference_ND = _read_features(samples), _read_features(reference)
        if self.samples_ND.shape[1] != self.reference_ND.shape[1]:
            raise UserError(
                f"{samples} and {reference}: {self.samples_ND.shape[1]} and {self.reference_ND.shape[1]} features an "
                "image; both files must come from the same feature space"
            )
        self.name, self.width = samples.stem, self.samples_ND.shape[1]
        self.identity, self.preprocessing = str(reference), "the user's own"

    def _compute(self, pixels_BHW3: NDArray[np.uint8]) -> dict[str, Tensor]:
        raise UserError(f"{self.name}: features from a file are of the images that they were computed from only")


def open_feature_space(spec: str, device: torch.device | str, inception: Path | None = None) -> FeatureSpace:
    """The space that `spec` names, its weights read and checked.

    Args:
        spec: `inception` | `teacher:NAME[:WEIGHTS]` | `patch-pca:DIR` | `classifier:DIR` | `SAMPLES.npy:REFERENCE.npy`.
        inception: torch-fidelity's file of weights, for `inception`.

    Raises:
        UserError: an unknown space, a package that it needs is missing, or weights that are missing or unfit.
    """
    device = torch.device(device)
    kind, _, rest = spec.partition(":")
    if spec == INCEPTION:
        if inception is None:
            raise UserError(
                "the feature space inception needs --inception FILE (torch-fidelity's "
                "weights-inception-2015-12-05-6726825d.pth); without that file, score in another one: " + KNOWN
            )
        from mepa_ds.evaluation.inception import Inception

        return Inception(inception, device)
    if kind == TEACHER and rest:
        from mepa_ds.evaluation.teacher_space import TeacherSpace

        name, _, weights = rest.partition(":")
        return TeacherSpace.open(name, weights or None, device)
    if kind == PATCH_PCA and rest:
        from mepa_ds.evaluation.teacher_space import TeacherSpace

        return TeacherSpace.open(PATCH_PCA, rest, device)
    if kind == CLASSIFIER and rest:
        from mepa_ds.evaluation.classifier import Classifier, ClassifierSpace

        return ClassifierSpace(Classifier.load(Path(rest), device))
    if spec.endswith(".npy"):
        first, separator, second = spec.partition(".npy:")
        if not separator:
            raise UserError(f"--features {spec}: give two files, SAMPLES.npy:REFERENCE.npy")
        return StoredFeatures(Path(f"{first}.npy"), Path(second))
    raise UserError(f"--features {spec}: no such feature space; expected {KNOWN}")


def _read_features(path: Path) -> Tensor:
    from mepa_ds.evaluation.formulas.checks import as_rows

    try:
        values = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: cannot read the features: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: no .npy file of plain numbers ({error}); write it with numpy.save") from error
    if not isinstance(values, np.ndarray):
        raise UserError(f"{path}: an .npz or another archive; expected an .npy file of shape (images, width)")
    return as_rows(values, str(path))
