"""Scores images in files against a reference in files, for `mepa evaluate` and SLURM's pipelines."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mepa_ds import distributed, log
from mepa_ds.data.shards.index import INDEX_NAME
from mepa_ds.errors import UserError
from mepa_ds.evaluation.classifier import Classifier
from mepa_ds.evaluation.measures import INTERVAL
from mepa_ds.evaluation.references import Images, Reference
from mepa_ds.evaluation.scorer import Scorer, ScorerOptions
from mepa_ds.files import check_file_writable, write_json
from mepa_ds.images.sets import ImageFiles, is_numbered
from mepa_ds.progress import Progress

_LEAST_IMAGES = 5
_PUBLISHED_IMAGES = 50_000
_BATCH = 256  # images in memory at a time
_CACHE = ".mepa_features"


@dataclass(frozen=True)
class Comparison:
    """`samples`: an .npz or a directory of images. `reference`: what `Reference` reads."""

    samples: Path
    reference: Path
    options: ScorerOptions = field(default_factory=ScorerOptions)


def score_files(comparison: Comparison, json: Path | None = None) -> dict[str, Any]:
    """Prints the scores, writes them to `json`, and returns them by name. A GPU is used where there is one.

    Raises:
        UserError: a file is missing or no set of images, or the two sets cannot be compared.
    """
    if json is not None:
        check_file_writable(json, "--json")
    if (comparison.samples / INDEX_NAME).exists():
        raise UserError(
            f"{comparison.samples}: a shard set can be a reference, and is no set of samples; give a directory of "
            "image files or an .npz, such as --make-reference makes of shards"
        )
    samples = ImageFiles(comparison.samples)
    height, width = samples.shape[1:3]
    if height != width and (comparison.reference / INDEX_NAME).exists():
        raise UserError(f"{comparison.samples}: images of {height} x {width}; a shard set is cropped to squares only")
    reference = Reference(comparison.reference, height)
    _check_sizes(comparison, samples, reference.images)
    device = distributed.device_of(distributed.read_launch())
    scorer = Scorer.open(reference, comparison.options, height, device)
    labels = _labels(comparison.samples, samples, scorer.classifier)
    scorer.check_samples(len(samples), labels)
    with Progress(total=len(samples), desc="samples", unit="image") as bar:
        features = scorer.features_of_all(samples.batches(_BATCH), str(comparison.samples), bar.update)
    log.say("distances and neighbours ...", flush=True)
    scores = {**scorer.score(features, labels), "samples": str(comparison.samples)}
    print_scores(scores)
    if json is not None:
        write_json(json, scores)
    return scores


def _labels(path: Path, samples: ImageFiles, classifier: Classifier | None) -> list[int] | None:
    """The samples' classes, as the classifier numbers them: class folders and its classes are matched by name.

    Raises:
        UserError: folders that are neither named as its classes nor numbered.
    """
    if samples.labels is None:
        return None
    labels: list[int] = samples.labels.tolist()
    known = () if classifier is None else classifier.config.classes
    if not known or not samples.classes:
        return labels
    if strange := sorted(set(samples.classes) - set(known)):
        if is_numbered(samples.classes):
            return labels
        raise UserError(
            f"{path}: the folders {', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''} are none of the "
            f"classifier's {len(known)} classes ({', '.join(known[:3])}, ...); name them as its classes, or by their "
            "numbers"
        )
    numbers = [int(name) for name in samples.classes] if is_numbered(samples.classes) else range(len(samples.classes))
    names = dict(zip(numbers, samples.classes, strict=True))
    return [known.index(names[label]) for label in labels]


def print_scores(scores: dict[str, Any]) -> None:
    """A line a score with its interval, then what was left out and what to mind."""
    protocol = scores["protocol"]
    for name, value in scores.items():
        if isinstance(value, (int, float)) and not name.startswith("num_") and not name.endswith(INTERVAL):
            interval = ""
            if f"{name}_low" in scores:
                interval = f"   ({_shown(scores[f'{name}_low'])} to {_shown(scores[f'{name}_high'])})"
            log.say(f"{name:<28} {_shown(value)}{interval}")
    for name, why in protocol["left_out"].items():
        log.say(f"{name:<28} - ({why})")
    for remark in protocol["remarks"]:
        log.say(f"warning: {remark}")
    if (classes := protocol["classes"]) is not None and not classes["balanced"]:
        low, high = classes["per_class"]
        empty = f"; classes without samples: {classes['empty']}" if "empty" in classes else ""
        log.say(f"warning: classes are unbalanced: {low} to {high} samples each{empty}")


def _shown(value: float) -> str:
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2e}"


def cache_beside(reference: Path) -> Path:
    """Where the features of a reference's images are kept."""
    return reference.absolute().parent / _CACHE


def _check_sizes(comparison: Comparison, samples: ImageFiles, real: Images | None) -> None:
    """Raises UserError for images that cannot be compared; warns of too few for a score that others could compare."""
    if real is not None and samples.shape[1:] != real.shape[1:]:
        raise UserError(
            f"{comparison.samples}: images of {samples.shape[1:3]}, but {comparison.reference} has "
            f"{real.shape[1:3]}; a reference of the same size is needed"
        )
    fewest = min(len(samples), len(samples) if real is None else len(real))
    if fewest < _LEAST_IMAGES:
        raise UserError(
            f"{len(samples)} images and {0 if real is None else len(real)} real ones: at least {_LEAST_IMAGES} of each "
            "are needed"
        )
    if len(samples) < _PUBLISHED_IMAGES:
        log.say(
            f"warning: {len(samples)} images; published scores are of {_PUBLISHED_IMAGES}, and fewer have a larger FID",
            flush=True,
        )
