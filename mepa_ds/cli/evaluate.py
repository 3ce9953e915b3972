"""`mepa evaluate`: FID, sFID, inception score, precision and recall of generated images."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from mepa_ds.cli import entry
from mepa_ds.errors import UserError


@dataclass
class EvaluateOptions:
    """Compares images with a reference by the protocol of ADM's evaluation suite. A GPU is used where there is one."""

    samples: tyro.conf.Positional[Path]
    """Images: an .npz with `arr_0` (uint8, N H W 3), or a directory of image files. Papers take 50 of each class."""
    reference: Path
    """Real images of the same size, in either form; ADM's VIRTUAL_imagenet256_labeled.npz brings its own statistics."""
    inception: Path
    """torch-fidelity's weights-inception-2015-12-05-6726825d.pth."""
    batch_size: int = 64
    """Images at a time."""
    order: Literal["shuffled", "file"] = "shuffled"
    """Of the images, for the splits of the inception score. file: as they come, as ADM's suite takes them."""
    json: Path | None = None
    """Also writes the scores to this file."""


def main(argv: list[str]) -> None:
    options = tyro.cli(EvaluateOptions, prog="mepa evaluate", args=argv)
    if options.batch_size < 1:
        raise UserError(f"--batch-size: expected at least 1, got {options.batch_size}")
    import torch
    from tqdm import tqdm

    from mepa_ds.files import check_writable, sha256_of_file, write_json
    from mepa_ds.image_files import ImageFiles
    from mepa_ds.loops.image_scores import Inception, ReferenceFile, image_scores

    if options.json is not None:
        check_writable(options.json.parent, "--json")
    samples, reference_file = ImageFiles(options.samples), ReferenceFile(options.reference)
    real = reference_file.images
    check_sizes(options, samples, real)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inception = Inception(options.inception, device)
    with tqdm(total=len(samples) + len(real), desc="evaluating", unit="image", disable=None) as bar:
        reference = reference_file.read(inception, options.batch_size, bar.update)
        features = inception.of_all(samples, options.batch_size, bar.update, str(options.samples))
    print("distances and neighbours ...", flush=True)
    scores: dict[str, Any] = image_scores(features, reference, options.order, device)
    for name, value in scores.items():
        print(f"{name:<20} " + ("- (of one split)" if value is None else f"{value:.4f}"))
    if options.json is not None:
        facts = {"num_samples": len(samples), "num_reference": len(real), "order": options.order}
        paths = {"samples": str(options.samples), "reference": str(options.reference)}
        write_json(options.json, {**scores, **facts, **paths, "inception_sha256": sha256_of_file(options.inception)})


def check_sizes(options: EvaluateOptions, samples: Any, real: Any) -> None:
    """Raises UserError for images that cannot be compared; warns of too few for a score that others could compare."""
    if samples.shape[1:] != real.shape[1:]:
        raise UserError(
            f"{options.samples}: images of {samples.shape[1:3]}, but {options.reference} has {real.shape[1:3]}; "
            "a reference of the same size is needed"
        )
    least = min(len(samples), len(real))
    if least < 5:
        raise UserError(f"{len(samples)} images and {len(real)} real ones: at least 5 of each are needed")
    if len(samples) < 50_000:
        print(f"warning: {len(samples)} images; published scores are of 50000, and fewer have a larger FID", flush=True)


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
