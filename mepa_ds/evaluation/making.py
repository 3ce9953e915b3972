"""Makes what scores need from the user's own shards: a reference file, and a classifier.

Shapes: N images, D features.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mepa_ds import distributed
from mepa_ds.data.images import images_once
from mepa_ds.data.shard_set import ShardSet, spread
from mepa_ds.errors import UserError
from mepa_ds.evaluation.classifier import LARGEST_SIDE, Classifier, as_input
from mepa_ds.evaluation.feature_spaces import FeatureSpace, StoredFeatures, open_feature_spaces
from mepa_ds.evaluation.formulas.gaussian import Gaussian, RunningGaussian
from mepa_ds.evaluation.inception import SPATIAL
from mepa_ds.evaluation.references import ADM_NAMES, ShardImages
from mepa_ds.files import atomic_path, check_file_writable, check_writable
from mepa_ds.progress import Progress

REFERENCE_IMAGES = 10_000
"""Images that a reference file holds, as ADM's."""
_BATCH = 256
_MOST_FITTED = 200_000
_HELDOUT_EVERY = 10


def make_reference(
    shards: Path, out: Path, features: tuple[str, ...], inception: Path | None = None, side: int | None = None
) -> dict[str, int]:
    """Writes an .npz with statistics of all images of a set and 10 000 of the images, evenly spread.

    Statistics of Inception are `mu, sigma, mu_s, sigma_s`, as in ADM's files; those of another space are `mu@NAME,
    sigma@NAME` and `identity@NAME`. Images are cropped and resized by ADM's preprocessing.

    Returns:
        The numbers of images: `num_images` and `num_kept`.

    Raises:
        UserError: no set of images, fewer than 2 of them, a damaged one, or a space that cannot be opened.
    """
    check_file_writable(out, "--out")
    images = ShardImages(shards, side, most=None)
    if len(images) < 2:
        raise UserError(f"{shards}: {len(images)} images; statistics need at least 2")
    device = distributed.device_of(distributed.read_launch())
    spaces = open_feature_spaces(features, device, inception)
    if stored := [space.name for space in spaces if isinstance(space, StoredFeatures)]:
        raise UserError(f"--features {stored[0]}: features from a file make no reference; name a network")
    statistics: dict[str, RunningGaussian] = {}
    kept_rows = set(spread(len(images), REFERENCE_IMAGES))
    kept_KHW3 = np.empty((len(kept_rows), *images.shape[1:]), np.uint8)  # 2 GB of 256 pixels
    labels, done = list[int](), 0
    with Progress(total=len(images), desc="reference", unit="image") as bar:
        for pixels_BHW3, labels_B in images.labelled_batches(_BATCH):
            for space in spaces:
                _add(statistics, space, pixels_BHW3)
            for row in range(len(labels_B)):
                if done + row in kept_rows:
                    kept_KHW3[len(labels)] = pixels_BHW3[row]
                    labels.append(int(labels_B[row]))
            done += len(labels_B)
            bar.update(len(labels_B))
    arrays: dict[str, Any] = {"arr_0": kept_KHW3}
    if min(labels) >= 0:
        arrays["arr_1"] = np.array(labels, np.int64)
    for name, running in statistics.items():
        mu, sigma = ADM_NAMES.get(name, (f"mu@{name}", f"sigma@{name}"))
        gaussian: Gaussian = running.gaussian()
        arrays |= {mu: gaussian.mean, sigma: gaussian.covariance}
    arrays |= {f"identity@{space.name}": np.array(space.identity) for space in spaces}
    _write_npz(out, arrays)
    return {"num_images": done, "num_kept": len(labels)}


def _add(statistics: dict[str, RunningGaussian], space: FeatureSpace, pixels_BHW3: NDArray[np.uint8]) -> None:
    outputs = space.outputs(pixels_BHW3)
    for name in (space.name, SPATIAL):
        if name in outputs:
            statistics.setdefault(name, RunningGaussian(outputs[name].shape[1])).add(outputs[name])


def _write_npz(path: Path, arrays: dict[str, Any]) -> None:
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array, order="C"), allow_pickle=False)


def fit_classifier(
    shards: Path, out: Path, heldout: Path | None = None, side: int | None = None, seed: int = 0
) -> Classifier:
    """Fits a classifier on a set and writes it to a directory.

    Args:
        heldout: a set of real images that it is judged by; None keeps every tenth image of `shards` back for that.
        side: of the images that models make, in pixels; None is that of the set's images.

    Raises:
        UserError: no set of images with labels, a class without images, or a damaged image.
    """
    check_writable(out, "--out")
    names = tuple(ShardSet(shards, "--fit-classifier").index.classes)
    if heldout is not None and (others := tuple(ShardSet(heldout, "--heldout").index.classes)) != names:
        raise UserError(
            f"--heldout: {heldout} has other classes ({', '.join(others[:3])}, ...; {len(others)}) than {shards} "
            f"({', '.join(names[:3])}, ...; {len(names)}), or has them in another order; build both sets alike"
        )
    side = side or ShardImages(shards).shape[1]
    images = _read(shards, side)
    if heldout is None:
        chosen_N = np.arange(len(images[1])) % _HELDOUT_EVERY == _HELDOUT_EVERY - 1
        judged = (images[0][chosen_N], images[1][chosen_N])
        images = (images[0][~chosen_N], images[1][~chosen_N])
    else:
        judged = _read(heldout, side)
    classes = len(names) or int(max(images[1].max(), judged[1].max())) + 1
    device = distributed.device_of(distributed.read_launch())
    classifier = Classifier.fit(images, judged, classes, seed, str(shards), device, names)
    classifier.save(out)
    return classifier


def _read(shards: Path, side: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images as training crops them, then at most 64 pixels wide; of sets of more than 200 000 an even share."""
    count = len(ShardSet(shards, "images"))
    small = min(side, LARGEST_SIDE)
    ranks = distributed.Ranks(0, -(-count // _MOST_FITTED))
    parts, labels = list[Tensor](), list[Tensor]()
    with Progress(total=-(-count // ranks.world_size), desc=f"reading {shards}", unit="image") as bar:
        for batch in images_once(shards, batch_size=_BATCH, image_side=side, ranks=ranks):
            pixels_B3HW = batch.pixels_B3HW
            if side != small:
                pixels_B3HW = as_input(pixels_B3HW, small).add(1).mul(127.5).round().clamp(0, 255).byte()
            parts.append(pixels_B3HW.permute(0, 2, 3, 1))
            labels.append(batch.labels_B)
            bar.update(len(batch.labels_B))
    if not parts:
        raise UserError(f"{shards}: this set is empty")
    return torch.cat(parts).contiguous().numpy(), torch.cat(labels).numpy()
