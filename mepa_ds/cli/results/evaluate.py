"""`mepa evaluate`: scores of generated images, and the reference files and classifiers that scores need."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.command_line.remote import RemoteSchemes
from mepa_ds.errors import UserError


@dataclass
class EvaluateOptions:
    """Compares images with a reference: FID, precision, recall and others, each with its 95 % interval.

    mepa evaluate SAMPLES --reference REF --inception FILE: by the protocol of ADM's evaluation suite.

    mepa evaluate SAMPLES --reference SHARDS --features patch-pca:DIR --classifier DIR: for data of your own.

    mepa evaluate --make-reference SHARDS --out REF.npz --inception FILE: a reference file like ADM's.

    mepa evaluate --fit-classifier SHARDS --heldout SHARDS --out DIR: what --classifier reads.
    """

    samples: tyro.conf.Positional[Path | None] = None
    """Images: an .npz with `arr_0` (uint8, N H W 3), or a directory of image files or of class folders. Papers use 50
    of each class."""
    reference: Path | None = None
    """Real images of the same size in either form, a shard set, or an .npz of statistics (mu, sigma); ADM's
    VIRTUAL_imagenet256_labeled.npz has images and statistics."""
    features: tuple[str, ...] = ("inception",)
    """Feature spaces to compare in: inception, teacher:NAME[:WEIGHTS] (teacher:dinov2-l:FILE is FD-DINOv2),
    patch-pca:DIR, classifier:DIR, SAMPLES.npy:REFERENCE.npy."""
    inception: Path | None = None
    """torch-fidelity's weights-inception-2015-12-05-6726825d.pth, for the space inception."""
    classifier: Path | None = None
    """What --fit-classifier wrote: also gives `class_agreement`, the share of samples that it assigns to the class
    asked for."""
    train: Path | None = None
    """Training shards: with --heldout, also tells whether samples are copies of training images."""
    heldout: Path | None = None
    """Shards that training has not seen."""
    order: Literal["shuffled", "file"] = "shuffled"
    """Order of the images in the splits of the inception score. file: as they come, as in ADM's suite, to check this
    program against that suite's published numbers."""
    json: Path | None = None
    """Also writes the scores and their protocol to this file."""
    make_reference: Path | None = None
    """Instead of scoring, writes a reference of this shard set: statistics of all images, and 10 000 images."""
    fit_classifier: Path | None = None
    """Instead of scoring, trains a small classifier on this shard set (minutes on a CPU)."""
    out: Path | None = None
    """What --make-reference (an .npz) or --fit-classifier (a directory) writes."""
    image_side: int | None = None
    """Pixels, for --make-reference and --fit-classifier of a set whose images are larger than the model's."""
    remote_schemes: RemoteSchemes = ()


_TAKEN = {
    "--make-reference": ("features", "inception", "remote_schemes"),
    "--fit-classifier": ("heldout", "remote_schemes"),
}
"""Options of scoring that the other tasks take as well."""


def main(argv: list[str]) -> None:
    options = tyro.cli(EvaluateOptions, prog="mepa evaluate", args=argv)
    _check(options)
    if options.image_side is not None and options.image_side < 1:
        raise UserError(f"--image-side: expected at least 1, got {options.image_side}")
    from mepa_ds.data.remote.schemes import allow

    allow(options.remote_schemes)
    if options.make_reference is not None:
        _make_reference(options, options.make_reference)
    elif options.fit_classifier is not None:
        _fit_classifier(options, options.fit_classifier)
    else:
        _score(options)


def _check(options: EvaluateOptions) -> None:
    tasks = {
        "SAMPLES": options.samples,
        "--make-reference": options.make_reference,
        "--fit-classifier": options.fit_classifier,
    }
    given = [name for name, value in tasks.items() if value is not None]
    if len(given) != 1:
        raise UserError(f"give one of {', '.join(tasks)}; got {' and '.join(given) or 'none'} (--help explains each)")
    if options.samples is not None and options.reference is None:
        raise UserError("--reference: give real images or statistics to compare with")
    if options.samples is None and options.out is None:
        raise UserError(f"--out: give what {given[0]} is to write")
    if options.samples is not None and (options.out is not None or options.image_side is not None):
        raise UserError("--out and --image-side belong to --make-reference and --fit-classifier; scores go to --json")
    if options.samples is None:
        taken = _TAKEN[given[0]]
        for name in ("reference", "features", "inception", "classifier", "train", "heldout", "order", "json"):
            if name not in taken and getattr(options, name) != getattr(EvaluateOptions, name):
                raise UserError(f"--{name} does not belong to {given[0]}; leave it out")
    if not options.features:
        raise UserError("--features: name at least one feature space (--help lists them)")


def _make_reference(options: EvaluateOptions, shards: Path) -> None:
    log.make_stdout_a_log()
    from mepa_ds.evaluation.making import make_reference

    assert options.out is not None
    counts = make_reference(shards, options.out, options.features, options.inception, options.image_side)
    log.say(f"{options.out}: statistics of {counts['num_images']} images, and {counts['num_kept']} of them")


def _fit_classifier(options: EvaluateOptions, shards: Path) -> None:
    log.make_stdout_a_log()
    from mepa_ds.evaluation.making import fit_classifier

    assert options.out is not None
    classifier = fit_classifier(shards, options.out, options.heldout, options.image_side)
    log.say(
        f"{options.out}: classifies {100 * classifier.heldout_accuracy:.2f} % of {classifier.config.num_heldout} "
        "held-out images rightly"
    )


def _score(options: EvaluateOptions) -> None:
    from mepa_ds.evaluation.score_files import Comparison, cache_beside, score_files
    from mepa_ds.evaluation.scorer import ScorerOptions

    assert options.samples is not None
    assert options.reference is not None
    wanted = ScorerOptions(
        features=options.features,
        inception=options.inception,
        classifier=options.classifier,
        train=options.train,
        heldout=options.heldout,
        cache=cache_beside(options.reference),
        order=options.order,
    )
    score_files(Comparison(options.samples, options.reference, wanted), options.json)


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
