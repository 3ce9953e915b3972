"""Spaces in which images are compared, by name: networks, or features that the user has computed.

Shapes: B images of a call, N of a file, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mepa_ds.config.paths import given_path
from mepa_ds.errors import UserError
from mepa_ds.evaluation.classifier import Classifier, ClassifierSpace
from mepa_ds.evaluation.formulas.checks import as_rows
from mepa_ds.evaluation.inception import Inception
from mepa_ds.evaluation.space import CLASSIFIER, INCEPTION, PATCH_PCA, TEACHER, FeatureSpace
from mepa_ds.evaluation.teacher_space import TeacherSpace
from mepa_ds.files import why_unreadable
from mepa_ds.safety.reading import check_array_file

__all__ = ["FeatureSpace", "StoredFeatures", "open_feature_space", "open_feature_spaces"]

_MOST_WIDTH = 8192
KNOWN = (
    "inception, teacher:NAME[:WEIGHTS], patch-pca:DIR, classifier:DIR, or SAMPLES.npy:REFERENCE.npy (features that you "
    "have computed, one row an image)"
)


class StoredFeatures(FeatureSpace):
    """Features in two .npy files, one row an image: of the samples, and of the reference."""

    def __init__(self, samples: Path, reference: Path):
        self.samples_ND, self.reference_ND = _read_features(samples), _read_features(reference)
        if self.samples_ND.shape[1] != self.reference_ND.shape[1]:
            raise UserError(
                f"{samples} and {reference}: {self.samples_ND.shape[1]} and {self.reference_ND.shape[1]} features an "
                "image; both files must come from the same feature space"
            )
        if self.samples_ND.shape[1] > _MOST_WIDTH:
            raise UserError(
                f"{samples}: {self.samples_ND.shape[1]} features an image; up to {_MOST_WIDTH} are compared (the "
                "covariance has the square of them): give a smaller layer, or principal components"
            )
        self.name, self.width = samples.stem, self.samples_ND.shape[1]
        self.identity, self.preprocessing = str(reference), "the user's own"

    def _compute(self, pixels_BHW3: NDArray[np.uint8]) -> dict[str, Tensor]:
        raise UserError(f"{self.name}: features from a file are of the images that they were computed from only")


def open_feature_spaces(
    specs: Sequence[str], device: torch.device | str, inception: Path | None = None
) -> list[FeatureSpace]:
    """`open_feature_space` of each. Raises UserError as it does, and for two of one name, of which a score or a
    statistic could not be told apart."""
    spaces = [open_feature_space(spec, device, inception) for spec in specs]
    names = [space.name for space in spaces]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"--features: two spaces have the name {', '.join(twice)}; give it once, or one after the other in two "
            "commands"
        )
    return spaces


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
    what = f"--features {spec}"
    if spec == INCEPTION:
        if inception is None:
            raise UserError(
                "the feature space inception needs --inception FILE (torch-fidelity's "
                "weights-inception-2015-12-05-6726825d.pth); without that file, score in another one: " + KNOWN
            )
        return Inception(inception, device)
    if kind == TEACHER and rest:
        name, _, weights = rest.partition(":")
        return TeacherSpace.open(name, str(given_path(weights, what)) if weights else None, device)
    if kind == PATCH_PCA and rest:
        return TeacherSpace.open(PATCH_PCA, str(given_path(rest, what)), device)
    if kind == CLASSIFIER and rest:
        return ClassifierSpace(Classifier.load(given_path(rest, what), device))
    if spec.endswith(".npy"):
        first, separator, second = spec.partition(".npy:")
        if not separator:
            raise UserError(f"{what}: give two files, SAMPLES.npy:REFERENCE.npy")
        return StoredFeatures(given_path(f"{first}.npy", what), given_path(second, what))
    raise UserError(f"{what}: no such feature space; expected {KNOWN}")


def _read_features(path: Path) -> Tensor:
    try:
        check_array_file(path)
        values = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: cannot read the features: {why_unreadable(path, error)}") from error
    except (ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{path}: no .npy file of plain numbers ({error}); write it with numpy.save") from error
    if not isinstance(values, np.ndarray):
        raise UserError(f"{path}: an .npz or another archive; expected an .npy file of shape (images, width)")
    return as_rows(values, str(path))
