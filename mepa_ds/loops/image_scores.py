"""Scores of generated images by the protocol of ADM's evaluation suite (arXiv 2105.05233): FID, sFID, inception score,
improved precision and recall. Networks and formulas are torch-fidelity's; what is ours is the protocol.

Shapes: N images, B of them in a batch, P = 2048 channels of the last pooling, S = 2023 spatial features (7 channels of
17 x 17), K = 1008 classes.
"""

from __future__ import annotations

import importlib
import io
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
from mepa_ds.image_files import ImageFiles
from mepa_ds.precision import full_fp32
from mepa_ds.weights import read_state_dict

Order = Literal["shuffled", "file"]
_SPLIT = 5000
_NEIGHBOURS = 3
_ROWS = 1000  # of the distances between all images at a time: 0.2 GB at 50 000, and three times that to rank them
_SPATIAL_CHANNELS = 7
_OFFICIAL = "weights-inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True)
class Features:
    """What the network sees in images, on the CPU in fp32."""

    pool_NP: Tensor
    spatial_NS: Tensor
    logits_NK: Tensor
    """Without the bias of the last layer, as ADM's suite has them."""


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def of(cls, features_ND: Tensor) -> Gaussian:
        values_ND = features_ND.double().numpy()
        return cls(values_ND.mean(0), np.cov(values_ND, rowvar=False))


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

    def of_all(self, images: ImageFiles, batch_size: int, on_batch: Callable[[int], object]) -> Features:
        """All images of a set; `on_batch` is told how many more are done."""
        parts = []
        for pixels_BHW3 in images.batches(batch_size):
            parts.append(self(pixels_BHW3))
            on_batch(len(pixels_BHW3))
        return Features(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("pool_NP", "spatial_NS", "logits_NK"))
        )


def _build(weights: Path) -> nn.Module:
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        raise UserError("this needs the package torch-fidelity: pip install 'mepa_ds[evaluation]'") from error
    # The package would execute a pickle, or download; it gets what was read safely, as a file in memory.
    memory = io.BytesIO()
    torch.save(read_state_dict(weights), memory)
    memory.seek(0)
    try:
        return module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], memory)
    except RuntimeError as error:
        line = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{weights}: not the weights of Inception v3 ({line}); expected {_OFFICIAL}") from error


def read_reference(
    path: Path, images: ImageFiles, inception: Inception, batch_size: int, on_batch: Callable[[int], object]
) -> Reference:
    """The reference at `path`, of which `images` are the images.

    Statistics are those stored in the file (`mu, sigma, mu_s, sigma_s`), or of its images where there are none.
    """
    features = inception.of_all(images, batch_size, on_batch)
    stored = _stored_statistics(path, features) or (Gaussian.of(features.pool_NP), Gaussian.of(features.spatial_NS))
    return Reference(*stored, features.pool_NP)


def _stored_statistics(path: Path, features: Features) -> tuple[Gaussian, Gaussian] | None:
    if path.is_dir():
        return None
    names = ("mu", "sigma", "mu_s", "sigma_s")
    with zipfile.ZipFile(path) as archive:
        there = {name for name in names if f"{name}.npy" in archive.namelist()}
    if not there:
        return None
    sizes = (features.pool_NP.shape[1], features.spatial_NS.shape[1])
    shapes = dict(zip(names, [(sizes[0],), (sizes[0],) * 2, (sizes[1],), (sizes[1],) * 2], strict=True))
    with np.load(path, allow_pickle=False) as arrays:
        found = {name: arrays[name].astype(np.float64) for name in there}
    for name in names:
        if name not in found or found[name].shape != shapes[name]:
            given = f"has shape {found[name].shape}" if name in found else "is missing"
            raise UserError(
                f"{path}: {name} {given}, expected {shapes[name]}: ADM's references have mu, sigma, mu_s, sigma_s"
            )
    return Gaussian(found["mu"], found["sigma"]), Gaussian(found["mu_s"], found["sigma_s"])


def image_scores(
    samples: Features, reference: Reference, order: Order = "shuffled", device: torch.device | None = None
) -> dict[str, float]:
    """`fid`, `sfid`, `inception_score` and its standard deviation over splits, `precision`, `recall`.

    The inception score is the mean over contiguous splits of about 5000 images. Images in the order of their classes
    would score a fifth of their worth, so they are shuffled, always alike; `order="file"` takes them as they come, as
    ADM's suite does (for comparisons with its numbers).

    Args:
        device: where the neighbours for precision and recall are looked for.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    splits = max(1, round(len(samples.logits_NK) / _SPLIT))
    inception = isc_features_to_metric(samples.logits_NK, splits, shuffle=order == "shuffled", rng_seed=0)
    manifold = prc_features_to_metric(
        samples.pool_NP.to(device),
        reference.pool_NP.to(device),
        prc_neighborhood=_NEIGHBOURS,
        prc_batch_size=_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return {
        "fid": frechet_distance(Gaussian.of(samples.pool_NP), reference.pool),
        "sfid": frechet_distance(Gaussian.of(samples.spatial_NS), reference.spatial),
        "inception_score": inception["inception_score_mean"],
        "inception_score_std": inception["inception_score_std"],
        "precision": manifold["precision"],
        "recall": manifold["recall"],
    }


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    given = ({"mu": gaussian.mean, "sigma": gaussian.covariance} for gaussian in (first, second))
    return float(fid_statistics_to_metric(*given, verbose=False)["frechet_inception_distance"])
