"""Scores images in files against a reference in files, for `mepa evaluate` and SLURM's pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mepa_ds import distributed
from mepa_ds.errors import UserError
from mepa_ds.evaluation.image_scores import Inception, Order, ReferenceFile, image_scores
from mepa_ds.files import check_writable, sha256_of_file, write_json
from mepa_ds.images.sets import ImageFiles

_LEAST_IMAGES = 5
_PUBLISHED_IMAGES = 50_000


@dataclass(frozen=True)
class Comparison:
    """`samples`, `reference`: an .npz or a directory of images. `inception`: torch-fidelity's file of weights."""

    samples: Path
    reference: Path
    inception: Path
    batch_size: int = 64
    order: Order = "shuffled"


def score_files(comparison: Comparison, json: Path | None = None) -> dict[str, Any]:
    """Prints the scores, writes them to `json`, and returns them by name. A GPU is used where there is one.

    Raises:
        UserError: a file is missing or no set of images, or the two sets cannot be compared.
    """
    if json is not None:
        check_writable(json.parent, "--json")
    samples, reference_file = ImageFiles(comparison.samples), ReferenceFile(comparison.reference)
    real = reference_file.images
    _check_sizes(comparison, samples, real)
    device = distributed.device_of(distributed.read_launch())
    inception = Inception(comparison.inception, device)
    with tqdm(total=len(samples) + len(real), desc="evaluating", unit="image", disable=None) as bar:
        reference = reference_file.read(inception, comparison.batch_size, bar.update)
        features = inception.of_all(samples, comparison.batch_size, bar.update, str(comparison.samples))
    print("distances and neighbours ...", flush=True)
    scores: dict[str, Any] = image_scores(features, reference, comparison.order, device)
    for name, value in scores.items():
        print(f"{name:<20} " + ("- (of one split)" if value is None else f"{value:.4f}"))
    if json is not None:
        facts = {"num_samples": len(samples), "num_reference": len(real), "order": comparison.order}
        paths = {"samples": str(comparison.samples), "reference": str(comparison.reference)}
        digest = sha256_of_file(comparison.inception)
        write_json(json, {**scores, **facts, **paths, "inception_sha256": digest})
    return scores


def _check_sizes(comparison: Comparison, samples: Any, real: Any) -> None:
    """Raises UserError for images that cannot be compared; warns of too few for a score that others could compare."""
    if samples.shape[1:] != real.shape[1:]:
        raise UserError(
            f"{comparison.samples}: images of {samples.shape[1:3]}, but {comparison.reference} has "
            f"{real.shape[1:3]}; a reference of the same size is needed"
        )
    if min(len(samples), len(real)) < _LEAST_IMAGES:
        raise UserError(f"{len(samples)} images and {len(real)} real ones: at least {_LEAST_IMAGES} of each are needed")
    if len(samples) < _PUBLISHED_IMAGES:
        print(
            f"warning: {len(samples)} images; published scores are of {_PUBLISHED_IMAGES}, and fewer have a larger FID",
            flush=True,
        )
