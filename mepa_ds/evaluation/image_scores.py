"""Scores of generated images by the protocol of ADM's evaluation suite (arXiv 2105.05233): FID, sFID, inception score,
improved precision and recall. The network is torch-fidelity's; formulas (`formulas.py`) and protocol are ours.

Shapes: N images, B of them in a batch, P = 2048 channels of the last pooling, S = 2023 spatial features (7 channels of
17 x 17), K = 1008 classes.
"""

from __future__ import annotations

import importlib
import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mepa_ds.errors import UserError
from mepa_ds.evaluation.formulas import (
    Gaussian,
    frechet_distance,
    inception_scores,
    is_covariance,
    precision_and_recall,
)
from mepa_ds.images.sets import ImageFiles
from mepa_ds.precision import full_fp32
from mepa_ds.weights.state_dict_files import read_state_dict
from mepa_ds.weights.state_dicts import Wanted

Order = Literal["shuffled", "file"]
_SPATIAL_CHANNELS = 7
_SHUFFLE_SEED = 0
_PACKAGE = (0, 4)  # the oldest version of torch-fidelity whose network the tests check
_WANTED = Wanted("Inception v3", ("Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch1x1.conv.weight", "fc.weight"))
_INSTALL = "pip install 'mepa_ds[evaluation]'"
_OFFICIAL = "weights-inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True)
class Features:
    """The network's outputs for images, on the CPU in fp32."""

    pool_NP: Tensor
    spatial_NS: Tensor
    logits_NK: Tensor
    """Logits without the bias of the last layer, as in ADM's suite."""

    def check(self, what: str, first: int = 0) -> None:
        """Raises UserError for features that are not finite; `first` is the number of the first image."""
        for features in (self.pool_NP, self.spatial_NS, self.logits_NK):
            if not (finite_N := features.isfinite().all(1)).all():
                raise UserError(
                    f"{what}: image {first + int(finite_N.logical_not().nonzero()[0])} has features that are not "
                    "finite; the network's weights (--inception) are damaged, or not those of Inception v3"
                )


# No images; the widths are the network's.
_NETWORK = Features(torch.empty(0, 2048), torch.empty(0, 2023), torch.empty(0, 1008))


@dataclass(frozen=True)
class Reference:
    """Real images. A reference of ADM's has statistics of the whole training set beside 10 000 images."""

    pool: Gaussian
    spatial: Gaussian
    pool_NP: Tensor


class Inception:
    """The TensorFlow Inception v3 of 2015 that FID is defined by, in fp32.

    Args:
        weights: torch-fidelity's conversion, `weights-inception-2015-12-05-6726825d.pth`.

    Raises:
        UserError: torch-fidelity is not installed, or the weights are not this network's.
    """

    def __init__(self, weights: Path, device: torch.device):
        self._device = device
        self._network = _build(weights).to(device)
        self._spatial_BCHW: Tensor | None = None
        # mixed_6/conv:0 of the TensorFlow graph.
        branch = self._network.get_submodule("Mixed_6d.branch1x1")
        branch.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: Any, output_BCHW: Tensor) -> None:
        self._spatial_BCHW = output_BCHW[:, :_SPATIAL_CHANNELS]

    @torch.inference_mode()
    def __call__(self, pixels_BHW3: NDArray[np.uint8]) -> Features:
        pixels_B3HW = torch.tensor(pixels_BHW3).to(self._device).permute(0, 3, 1, 2)
        with full_fp32():  # TF32 moves FID
            pool_BP, logits_BK = self._network(pixels_B3HW)
        assert self._spatial_BCHW is not None
        spatial_BS = self._spatial_BCHW.permute(0, 2, 3, 1).flatten(1)  # TensorFlow's order
        return Features(pool_BP.cpu(), spatial_BS.cpu(), logits_BK.cpu())

    def of_all(self, images: ImageFiles, batch_size: int, on_batch: Callable[[int], object], what: str) -> Features:
        """Features of all images of a set; `on_batch` is called with the number of images of each batch.

        Raises:
            UserError: features are not finite (`what` begins the message), or an image cannot be read.
        """
        parts: list[Features] = []
        num_done = 0
        for pixels_BHW3 in images.batches(batch_size):
            parts.append(self(pixels_BHW3))
            parts[-1].check(what, num_done)
            num_done += len(pixels_BHW3)
            on_batch(len(pixels_BHW3))
        return Features(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("pool_NP", "spatial_NS", "logits_NK"))
        )


def _build(weights: Path) -> nn.Module:
    network = _network_class()
    # The package would execute a pickle, or download one. It gets weights that were read safely, as a file in memory.
    memory = io.BytesIO()
    torch.save(read_state_dict(weights, wanted=_WANTED), memory)
    memory.seek(0)
    try:
        return network("inception", ["2048", "logits_unbiased"], memory)
    except RuntimeError as error:
        line = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{weights}: not the weights of Inception v3 ({line}); expected {_OFFICIAL}") from error


def _network_class() -> Callable[..., nn.Module]:
    """Raises UserError where torch-fidelity is missing, broken or too old."""
    try:
        version = str(importlib.import_module("torch_fidelity.version").__version__)
        found = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    except (ImportError, AttributeError) as error:
        raise UserError(f"this needs the package torch-fidelity ({error}): {_INSTALL}") from error
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < _PACKAGE:
        raise UserError(f"torch-fidelity {version} is installed, but 0.4 or a newer one is needed: {_INSTALL}")
    return found  # type: ignore[no-any-return]


class ReferenceFile:
    """Real images on disk, and the statistics (`mu, sigma, mu_s, sigma_s`) that an .npz may have beside them.

    Raises:
        UserError: at construction, for a damaged file, for a file without images (precision and recall need them), and
            for statistics that cannot be used: before a GPU has spent an hour on the samples.
    """

    def __init__(self, path: Path):
        self._path = path
        self._statistics = None if path.is_dir() else _stored_statistics(path, _NETWORK)
        self.images = ImageFiles(path)

    def read(self, inception: Inception, batch_size: int, on_batch: Callable[[int], object]) -> Reference:
        """Statistics are those stored in the file, or of its images where there are none."""
        features = inception.of_all(self.images, batch_size, on_batch, str(self._path))
        pool, spatial = self._statistics or (Gaussian.of(features.pool_NP), Gaussian.of(features.spatial_NS))
        return Reference(pool, spatial, features.pool_NP)


def _stored_statistics(path: Path, features: Features) -> tuple[Gaussian, Gaussian] | None:
    """The statistics in an .npz, as wide as the features; None where it has none.

    Raises:
        UserError: the file is damaged or has no images; statistics are missing, of another shape, or no numbers, or
            a covariance is none.
    """
    pools, spatials = features.pool_NP.shape[1], features.spatial_NS.shape[1]
    shapes = {"mu": (pools,), "sigma": (pools, pools), "mu_s": (spatials,), "sigma_s": (spatials, spatials)}
    found = _read_arrays(path, tuple(shapes))
    if not found:
        return None
    for name, shape in shapes.items():
        array = found.get(name)
        fault = None
        if array is None:
            fault = "is missing"
        elif array.shape != shape:
            fault = f"has shape {array.shape}"
        elif not np.isfinite(array).all():
            fault = "has values that are not finite"
        elif array.ndim == 2 and not is_covariance(array):
            fault = "is no covariance (it is not symmetric, or has negative eigenvalues)"
        if fault is not None:
            expected = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise UserError(
                f"{path}: {name} {fault}; expected {expected}, "
                "as ADM's references have them. Leave all four out, and they are computed from the images"
            )
    return Gaussian(found["mu"], found["sigma"]), Gaussian(found["mu_s"], found["sigma_s"])


def _read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[np.float64]]:
    """The named arrays, as far as they are there. The whole file is read, so that damage is found now."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{path}: {damaged} is damaged (its checksum differs); copy or download the file again")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in names if f"{name}.npy" in members}
    except OSError as error:
        raise UserError(f"{path}: cannot read the reference: {error.strerror or error}") from error
    except UserError:
        raise
    except Exception as error:  # damaged bytes raise almost anything: BadZipFile, zlib.error, ValueError, ...
        raise UserError(
            f"{path}: damaged, or not an .npz of plain arrays ({error}); copy, download or make it again"
        ) from error
    if "arr_0.npy" not in members:
        raise UserError(
            f"{path}: no arr_0 among {', '.join(members) or 'nothing'}: precision and recall need the reference's "
            "images (uint8, N H W 3), statistics alone are not enough"
        )
    for name, array in found.items():
        if array.dtype.kind not in "fiu":
            raise UserError(f"{path}: {name} is of type {array.dtype}, expected floating-point numbers")
    return {name: array.astype(np.float64) for name, array in found.items()}


def image_scores(
    samples: Features, reference: Reference, order: Order = "shuffled", device: torch.device | None = None
) -> dict[str, float | None]:
    """`fid`, `sfid`, `inception_score` and its standard deviation over splits, `precision`, `recall`.

    The inception score is the mean over splits of 5000, 5000, ... images and the rest. Images in the order of their
    classes would score a fifth, so they are shuffled, always in the same way. `order="file"` takes them as they come,
    as ADM's suite does (for comparisons with its numbers). A single split has no deviation: None.

    Args:
        device: where the neighbours for precision and recall are looked for.

    Raises:
        UserError: features that are not finite, or too few images for third neighbours.
    """
    samples.check("the samples")
    if not reference.pool_NP.isfinite().all():
        raise UserError("the reference: features of its images are not finite; check --inception and the images")
    logits_NK = samples.logits_NK
    if order == "shuffled":
        logits_NK = logits_NK[np.random.RandomState(_SHUFFLE_SEED).permutation(len(logits_NK))]
    splits = inception_scores(logits_NK)
    precision, recall = precision_and_recall(samples.pool_NP, reference.pool_NP, device)
    return {
        "fid": frechet_distance(Gaussian.of(samples.pool_NP), reference.pool),
        "sfid": frechet_distance(Gaussian.of(samples.spatial_NS), reference.spatial),
        "inception_score": float(np.mean(splits)),
        "inception_score_std": float(np.std(splits)) if len(splits) > 1 else None,
        "precision": precision,
        "recall": recall,
    }
