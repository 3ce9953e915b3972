"""Scores of images in memory or on disk: prepared once for a reference, then asked as often as wanted.

Shapes: B images of a batch, N samples, M reference images, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mepa_ds import distributed
from mepa_ds.data.shards.index import INDEX_NAME
from mepa_ds.errors import UserError
from mepa_ds.evaluation.classifier import PROBS, Classifier, ClassifierSpace
from mepa_ds.evaluation.feature_spaces import FeatureSpace, StoredFeatures, open_feature_spaces
from mepa_ds.evaluation.formulas.gaussian import FrechetTo, Gaussian
from mepa_ds.evaluation.inception import LOGITS, SPATIAL
from mepa_ds.evaluation.kept_features import EXTRAS, KeptFeatures
from mepa_ds.evaluation.measures import Measures, nearest_to_training
from mepa_ds.evaluation.references import Reference, ShardImages
from mepa_ds.evaluation.space import INCEPTION, check_finite

Order = Literal["shuffled", "file"]
AGREEMENT = "agreement.probs"
"""The key of the classifier's probabilities among features."""


@dataclass(frozen=True)
class ScorerOptions:
    """What is computed. features: as `open_feature_spaces` reads them. classifier: a directory that `Classifier.save`
    wrote. train, heldout: shard sets for the test of memorisation, in the first of the spaces. cache: a directory for
    the reference's features (None: they are computed anew). seed: of every draw."""

    features: tuple[str, ...] = (INCEPTION,)
    inception: Path | None = None
    classifier: Path | None = None
    train: Path | None = None
    heldout: Path | None = None
    cache: Path | None = None
    order: Order = "shuffled"
    seed: int = 0


@dataclass(frozen=True)
class SpaceReference:
    """The reference in one space. frechet: None for a reference of fewer than 2 images; features_MD: None where there
    are statistics alone."""

    frechet: FrechetTo
    features_MD: Tensor | None
    source: str
    num_images: int | None = None
    """That the statistics are of; None where a file has the statistics."""


class Scorer:
    """`features` of images on every rank, `score` where all are gathered; see `score_images` for one process.

    Attributes: `spaces`, `classifier`, and `reference` (None for a rank that computes features only).
    """

    def __init__(self, spaces: Sequence[FeatureSpace], classifier: Classifier | None, options: ScorerOptions):
        self.spaces, self.classifier, self.options = list(spaces), classifier, options
        self.reference: Reference | None = None
        self._spaces: dict[str, SpaceReference] = {}
        self._training: tuple[Tensor, Tensor] | None = None
        self._training_facts: dict[str, Any] | None = None
        self._device = torch.device("cpu")

    @classmethod
    def open(
        cls,
        reference: Reference | Path | None,
        options: ScorerOptions,
        image_side: int | None = None,
        device: torch.device | None = None,
    ) -> Scorer:
        """Opens and checks everything, then computes the reference's features, or reads them from the cache.

        Args:
            reference: None on ranks that only compute features.
            image_side: of the samples: a shard set's images are cropped and resized to it.
            device: None is this rank's.

        Raises:
            UserError: a reference, a space or a classifier that cannot be used.
        """
        if isinstance(reference, Path):
            reference = Reference(reference, image_side)
        device = device or distributed.device_of(distributed.read_launch())
        spaces = open_feature_spaces(options.features, device, options.inception)
        classifier = None if options.classifier is None else Classifier.load(options.classifier, device)
        scorer = cls(spaces, classifier, options)
        scorer._device = device
        if reference is not None:
            scorer.reference = reference
            training = scorer._training_sets(image_side)
            for space in scorer.spaces:
                scorer._take_reference(space, reference)
            if training is not None:
                scorer._take_training(*training)
        return scorer

    def check_samples(self, count: int, labels: Sequence[int] | Tensor | NDArray[np.int64] | None) -> None:
        """Raises UserError for what can be known of so many samples with these labels before their features are."""
        for space in self.spaces:
            if isinstance(space, StoredFeatures) and len(space.samples_ND) != count:
                raise UserError(
                    f"{space.name}: features of {len(space.samples_ND)} images, but there are {count} samples; give a "
                    "row for each"
                )
        if labels is None:
            return
        given = np.asarray(labels, np.int64)
        if len(given) != count:
            raise UserError(f"{len(given)} labels for {count} samples; give one for each")
        known = None if self.classifier is None else self.classifier.config.num_classes
        if known is not None and (given.min() < 0 or given.max() >= known):
            raise UserError(
                f"labels from {given.min()} to {given.max()}, but the classifier knows classes 0..{known - 1}; give "
                "the classifier of this data set"
            )

    def features(self, pixels_BHW3: NDArray[np.uint8], first: int = 0, what: str = "samples") -> dict[str, Tensor]:
        """All that `score` needs of these images, a row each, on the CPU. A row depends on its image alone.

        Args:
            first, what: number of the first image and name of the set, for messages.

        Raises:
            UserError: features that are not finite.
        """
        found: dict[str, Tensor] = {}
        for space in self.spaces:
            if not isinstance(space, StoredFeatures):
                found |= space.outputs(pixels_BHW3)
        if self.classifier is not None:
            found[AGREEMENT] = ClassifierSpace(self.classifier).outputs(pixels_BHW3)[PROBS]
        check_finite(found, what, first)
        return found

    def features_of_all(
        self, batches: Iterable[NDArray[np.uint8]], what: str = "samples", on_batch: Callable[[int], object] = int
    ) -> dict[str, Tensor]:
        """`features` of many batches; `on_batch` is called with the number of images of each."""
        parts, done = list[dict[str, Tensor]](), 0
        for pixels_BHW3 in batches:
            parts.append(self.features(pixels_BHW3, done, what))
            done += len(pixels_BHW3)
            on_batch(len(pixels_BHW3))
        if not done:
            raise UserError(f"{what}: there are no images to score")
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def score(self, features: dict[str, Tensor], labels: Sequence[int] | Tensor | None = None) -> dict[str, Any]:
        """All scores by name, with their standard errors and intervals, and `protocol`.

        Args:
            features: of all samples, as `features` gave them; rows in the order of the samples.
            labels: the classes asked for, one for each sample.

        Raises:
            UserError: too few samples, or labels that do not fit.
        """
        assert self.reference is not None, "opened without a reference"
        measures = Measures(self.options.seed, self._device)
        stored = [len(space.samples_ND) for space in self.spaces if isinstance(space, StoredFeatures)]
        count = next((len(rows) for rows in features.values()), stored[0] if stored else 0)
        self.check_samples(count, labels)
        for space in self.spaces:
            samples_ND = space.samples_ND if isinstance(space, StoredFeatures) else features[space.name]
            mine = self._spaces[space.name]
            names = _names_of(space.name)
            measures.add_space(names, samples_ND, mine.frechet, mine.features_MD)
            if mine.num_images is not None and mine.num_images <= space.width:
                measures.remarks.append(
                    f"{names('fd')}: the {mine.num_images} images of the reference are fewer than the covariance of "
                    f"{space.width} features needs ({space.width + 1}); compare only with scores by the same reference"
                )
            if space.name == INCEPTION:
                if SPATIAL in self._spaces:
                    measures.add_frechet("sfid", features[SPATIAL], self._spaces[SPATIAL].frechet)
                else:
                    measures.leave_out("sfid", "the reference has mu and sigma, but no mu_s and sigma_s")
                measures.add_inception_score(features[LOGITS], self.options.order)
        if self._training is not None:
            train_TD, heldout_HD = self._training
            name = self.spaces[0].name
            measures.add(**nearest_to_training(features[name], train_TD, heldout_HD, self._device))
            facts = (self._training_facts or {})["train"]
            if facts["images"] < facts["of"]:
                measures.remarks.append(
                    f"memorisation: samples are compared with {facts['images']} of the {facts['of']} training images; "
                    "copies of the others are not seen"
                )
        given = None if labels is None else np.asarray(labels, np.int64)
        self._add_agreement(measures, features, given)
        protocol = self._protocol(measures, count, given)
        counts = {name: protocol[name] for name in ("num_samples", "num_reference")}
        return {**counts, **measures.scores, "protocol": protocol}

    def _add_agreement(self, measures: Measures, features: dict[str, Tensor], labels: NDArray[np.int64] | None) -> None:
        if self.classifier is None:
            return
        measures.add(classifier_heldout_accuracy=self.classifier.heldout_accuracy)
        if labels is None:
            measures.leave_out("class_agreement", "the samples have no labels")
        else:
            agrees_N = torch.from_numpy(features[AGREEMENT].argmax(1).numpy() == labels)
            measures.add_share("class_agreement", agrees_N.double())

    def _take_reference(self, space: FeatureSpace, reference: Reference) -> None:
        stored = {name: reference.statistics[name] for name in (space.name, *EXTRAS.get(space.name, ()))
                  if name in reference.statistics}  # fmt: skip
        identity = reference.identities.get(space.name)
        if space.name in stored and (
            identity not in (None, space.identity) or _width(stored[space.name]) != space.width
        ):
            raise UserError(
                f"{reference.path}: its statistics of {space.name} ({_width(stored[space.name])} features, identity "
                f"{identity}) are of other weights than the {space.name} given ({space.width}, {space.identity}); make "
                "the reference again"
            )
        if isinstance(space, StoredFeatures):
            gaussian = Gaussian.of(space.reference_ND)
            self._spaces[space.name] = SpaceReference(
                FrechetTo(gaussian, self._device),
                space.reference_ND,
                f"the {len(space.reference_ND)} features given",
                len(space.reference_ND),
            )
            return
        if reference.images is None and space.name not in stored:
            raise UserError(
                f"{reference.path}: has statistics of {', '.join(reference.statistics)} and no images, so it has "
                f"nothing to compare {space.name} with; give a reference with images"
            )
        rows = {} if reference.images is None else self._features_of(space, reference)
        for name in (space.name, *EXTRAS.get(space.name, ())):
            count = None
            if name in stored:
                source = "statistics in the reference"
                gaussian = stored[name]
            elif name in rows and (name == space.name or space.name not in stored):
                count = len(rows[name])
                source, gaussian = f"statistics of the reference's {count} images", Gaussian.of(rows[name])
            else:
                continue
            kept = rows.get(name) if name == space.name else None
            self._spaces[name] = SpaceReference(FrechetTo(gaussian, self._device), kept, source, count)

    def _features_of(self, space: FeatureSpace, reference: Reference) -> dict[str, Tensor]:
        """Of the reference's images, by name."""
        assert reference.images is not None
        kept = KeptFeatures(self.options.cache, reference.fingerprint(), self._device.type)
        return kept.read_or_compute(space, reference.images)

    def _training_sets(self, side: int | None) -> tuple[Reference, Reference] | None:
        """The training set and the held-out one, opened."""
        given = {"--train": self.options.train, "--heldout": self.options.heldout}
        if not any(given.values()):
            return None
        found = []
        for name, shards in given.items():
            if shards is None:
                raise UserError("--train and --heldout: give both, or neither: one is judged by the other")
            if not (shards / INDEX_NAME).exists():
                raise UserError(f"{name}: {shards}: expected a shard set (a directory with {INDEX_NAME})")
            found.append(Reference(shards, side))
        space = self.spaces[0]
        if isinstance(space, StoredFeatures):
            raise UserError(f"--train: features of images are needed, and {space.name} is a file; name another first")
        return found[0], found[1]

    def _take_training(self, train: Reference, heldout: Reference) -> None:
        """Features of both, in the first space."""
        space, rows, facts = self.spaces[0], list[Tensor](), dict[str, Any]()
        for name, shards in (("train", train), ("heldout", heldout)):
            assert isinstance(shards.images, ShardImages)
            rows.append(self._features_of(space, shards)[space.name])
            facts[name] = {"path": str(shards.path), "images": len(rows[-1]), "of": shards.images.num_available}
        self._training, self._training_facts = (rows[0], rows[1]), facts

    def _protocol(self, measures: Measures, count: int, labels: NDArray[np.int64] | None) -> dict[str, Any]:
        assert self.reference is not None
        images = self.reference.images
        return {
            "num_samples": count,
            "reference": str(self.reference.path),
            "reference_kind": self.reference.kind,
            "num_reference": 0 if images is None else len(images),
            "image_side": None if images is None else list(images.shape[1:3]),
            "spaces": {
                space.name: {**space.facts(), "statistics": self._spaces[space.name].source} for space in self.spaces
            },
            "classifier": None if self.classifier is None else self.classifier.identity,
            "memorisation": self._training_facts,
            "classes": _balance(labels, 0 if self.classifier is None else self.classifier.config.num_classes),
            "order": self.options.order,
            "seed": self.options.seed,
            "device": self._device.type,
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
            "left_out": measures.left_out,
            "remarks": measures.remarks,
        }


def score_images(
    pixels: Iterable[NDArray[np.uint8]], labels: Sequence[int] | Tensor | None, scorer: Scorer
) -> dict[str, Any]:
    """Scores of images in one process.

    Args:
        pixels: batches (B, H, W, 3) uint8, all of one size.
        labels: the class asked for of each image; None: unknown.

    Returns:
        JSON numbers by name, and `protocol`: how they came about.
    """
    return scorer.score(scorer.features_of_all(pixels), labels)


def gather_features(features: dict[str, Tensor], numbers: Sequence[int]) -> dict[str, Tensor]:
    """Rows of all ranks, in the order of the images' numbers, on every rank. Collective.

    Args:
        features: this rank's, as `Scorer.features` gives them; {} where it has no images.
        numbers: which image each of its rows is of, among all.
    """
    everyone = list(zip(distributed.tensors_of_all(features), distributed.of_all(list(numbers)), strict=True))
    order = np.argsort([number for _, mine in everyone for number in mine], kind="stable")
    parts = [found for found, mine in everyone if mine]
    return {name: torch.cat([part[name] for part in parts])[order] for name in (parts[0] if parts else {})}


def _names_of(space: str) -> Callable[[str], str]:
    """Score -> its name. Inception's have the names that papers give them."""
    if space == INCEPTION:
        return lambda score: {"fd": "fid", "fd_infinity": "fid_infinity"}.get(score, score)
    return lambda score: f"{space}.{score}"


def _width(gaussian: Gaussian) -> int:
    return len(gaussian.mean)


def _balance(labels: NDArray[np.int64] | None, num_classes: int) -> dict[str, Any] | None:
    """How many samples each class has, and which have none; `num_classes`: 0 if only the labels tell."""
    if labels is None or not len(labels):
        return None
    counts_C = np.bincount(labels[labels >= 0], minlength=num_classes)
    present = counts_C[counts_C > 0]
    facts: dict[str, Any] = {"num_classes": len(counts_C), "per_class": [int(present.min()), int(present.max())]}
    if empty := np.flatnonzero(counts_C == 0).tolist():
        facts["empty"] = empty[:20]
    facts["balanced"] = bool((counts_C == counts_C[0]).all())
    return facts
