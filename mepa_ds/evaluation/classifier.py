"""A small classifier of the user's own images: it judges whether samples show the class that was asked for, and its
features are a space for data sets that no public network knows.

Shapes: N images, B a batch of them, H W their sides, S the side that the network sees, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from mepa_ds.config.base import Section
from mepa_ds.config.values import PositiveInt
from mepa_ds.errors import UserError
from mepa_ds.evaluation.space import CLASSIFIER, FeatureSpace
from mepa_ds.files import identity_of_weights
from mepa_ds.progress import Progress
from mepa_ds.weights.directories import load_strict, read_pretrained, save_pretrained
from mepa_ds.weights.file_checks import check_fits

KIND = "classifier"
LARGEST_SIDE = 64
"""Images are reduced to this side: enough to tell classes apart, and a tenth of the time of 256 pixels."""

_WIDTH, _WIDEST = 32, 128
_LARGE, _SMALLEST_MAP = 16, 4  # sides: of images that the first layer halves, of the last map
_BATCH = 128
_LEARNING_RATE, _WEIGHT_DECAY, _SMOOTHING = 4e-3, 0.02, 0.1
_IMAGES_SEEN, _EPOCHS = 150_000, (2, 12)  # the latter limit the former
_SHIFT = 1 / 32  # of the side, the largest random shift while training


class ClassifierConfig(Section):
    """Stored as `config.json` beside the weights."""

    num_classes: PositiveInt
    side: PositiveInt
    """Side, in pixels, that images are resized to."""
    heldout_accuracy: Annotated[float, Field(ge=0, le=1)]
    """Share of real images that training has not seen and that it classifies rightly: samples cannot be expected to
    agree more."""
    num_heldout: PositiveInt
    trained_on: str = ""
    seed: int = 0
    classes: tuple[str, ...] = ()
    """Names of the classes, in their order; empty where the training set has none."""


class Classifier:
    """`probs` and `features` of uint8 images of any size; frozen once it is fitted or loaded."""

    def __init__(self, config: ClassifierConfig, device: torch.device | str = "cpu"):
        self.config = config
        self.device = torch.device(device)
        network = _network(config.side, config.num_classes).to(self.device).eval()
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.identity = ""

    @property
    def width(self) -> int:
        """D"""
        return int(self.network[1].in_features)  # type: ignore[arg-type]

    @property
    def heldout_accuracy(self) -> float:
        return self.config.heldout_accuracy

    @classmethod
    def fit(
        cls,
        images: tuple[NDArray[np.uint8], NDArray[np.int64]],
        heldout: tuple[NDArray[np.uint8], NDArray[np.int64]],
        num_classes: int,
        seed: int = 0,
        trained_on: str = "",
        device: torch.device | str = "cpu",
        classes: tuple[str, ...] = (),
    ) -> Classifier:
        """Trains on images (N, S, S, 3) of one side with labels (N,), and measures the accuracy on held-out ones.

        The same images in the same order give the same weights, to the bit with the same number of threads.

        Raises:
            UserError: labels outside 0..num_classes - 1, no images, or a class without any.
        """
        for what, (pixels, labels) in (("training images", images), ("held-out images", heldout)):
            _check_labels(what, len(pixels), labels, num_classes)
        counts_C = np.bincount(images[1], minlength=num_classes)
        if (empty := np.flatnonzero(counts_C == 0)).size:
            raise UserError(
                f"{trained_on or 'training images'}: {empty.size} of {num_classes} classes have no images (class "
                f"{empty[0]} is the first), so they cannot be told apart; give images of all classes"
            )
        config = ClassifierConfig(
            num_classes=num_classes, side=images[0].shape[1], heldout_accuracy=0, num_heldout=len(heldout[1]),
            trained_on=trained_on, seed=seed, classes=classes,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classifier = cls(config, device)
        classifier._train(*images)
        classifier._freeze()
        found_N = classifier.probs(heldout[0]).argmax(1).numpy()
        classifier.config = config.model_copy(update={"heldout_accuracy": float((found_N == heldout[1]).mean())})
        return classifier

    def save(self, directory: Path) -> None:
        save_pretrained(directory, self.config, self.network.state_dict(), KIND)

    @classmethod
    def load(cls, directory: Path, device: torch.device | str = "cpu") -> Classifier:
        """Reads what `save` wrote. Raises UserError for anything else."""
        config, state = read_pretrained(directory, ClassifierConfig, KIND)
        check_fits(lambda: _network(config.side, config.num_classes), state, str(directory))
        classifier = cls(config, device)
        load_strict(classifier.network, state, str(directory))
        classifier._freeze()
        return classifier

    @torch.inference_mode()
    def probs(self, pixels_NHW3: NDArray[np.uint8]) -> Tensor:
        """(N, C) float32 on the CPU."""
        return ClassifierSpace(self).outputs(pixels_NHW3)[PROBS]

    @torch.inference_mode()
    def features(self, pixels_NHW3: NDArray[np.uint8]) -> Tensor:
        """(N, D) float32 on the CPU: what the last layer sees."""
        return ClassifierSpace(self)(pixels_NHW3)

    def compute(self, pixels_BHW3: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """Features (B, D) and probabilities (B, C) of one batch."""
        images_B3SS = as_input(torch.from_numpy(pixels_BHW3).to(self.device).permute(0, 3, 1, 2), self.config.side)
        features_BD = self.network[0](images_B3SS)
        return features_BD, self.network[1](features_BD).softmax(1)

    def _freeze(self) -> None:
        self.network.eval().requires_grad_(False)
        self.identity = identity_of_weights(self.network.state_dict())

    def _train(self, pixels_NSS3: NDArray[np.uint8], labels_N: NDArray[np.int64]) -> None:
        rng = np.random.default_rng(self.config.seed)
        epochs = min(max(round(_IMAGES_SEEN / len(labels_N)), _EPOCHS[0]), _EPOCHS[1])
        batch = min(_BATCH, len(labels_N))
        steps = epochs * (len(labels_N) // batch)
        optimizer = torch.optim.AdamW(self.network.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.2)
        self.network.train()
        with Progress(total=steps, desc="fitting the classifier", unit="step") as bar:
            for rows_B in _batches(len(labels_N), batch, epochs, rng):
                images_B3SS = torch.from_numpy(_shifted(pixels_NSS3[rows_B], rng)).to(self.device).permute(0, 3, 1, 2)
                target_B = torch.from_numpy(labels_N[rows_B]).to(self.device)
                logits_BC = self.network(as_input(images_B3SS, self.config.side))
                optimizer.zero_grad()
                F.cross_entropy(logits_BC, target_B, label_smoothing=_SMOOTHING).backward()
                optimizer.step()
                schedule.step()
                bar.update()


class ClassifierSpace(FeatureSpace):
    """What the classifier's last layer sees; its probabilities beside it."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier
        self.name, self.identity = CLASSIFIER, classifier.identity
        self.width = classifier.width
        side = classifier.config.side
        self.preprocessing = f"bilinear with antialiasing to {side} x {side}"
        self.chunk = 64

    def _compute(self, pixels_BHW3: NDArray[np.uint8]) -> dict[str, Tensor]:
        features_BD, probs_BC = self.classifier.compute(pixels_BHW3)
        return {self.name: features_BD, PROBS: probs_BC}


PROBS = f"{CLASSIFIER}.probs"


def _network(side: int, num_classes: int) -> nn.Sequential:
    """(trunk, last layer): convolutions that halve the map until it has about 4 x 4 places, and their mean."""
    stride = 2 if side > _LARGE else 1
    layers: list[nn.Module] = [*_convolution(3, _WIDTH, stride)]
    width, places = _WIDTH, -(-side // stride)
    while places > _SMALLEST_MAP:
        wider = min(2 * width, _WIDEST)
        layers += [*_convolution(width, wider, 2), *_convolution(wider, wider, 1)]
        width, places = wider, -(-places // 2)
    trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(trunk, nn.Linear(width, num_classes))


def _convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def as_input(pixels_B3HW: Tensor, side: int) -> Tensor:
    """uint8 images of any size as the network sees them: (B, 3, S, S) float32 in [-1, 1]."""
    images_B3HW = pixels_B3HW.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
    if images_B3HW.shape[-2:] == (side, side):
        return images_B3HW
    return F.interpolate(images_B3HW, size=(side, side), mode="bilinear", antialias=True)


def _batches(count: int, batch: int, epochs: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    for _ in range(epochs):
        order = rng.permutation(count)
        for first in range(0, count - batch + 1, batch):
            yield order[first : first + batch]


def _shifted(pixels_BSS3: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The batch, moved by a few pixels in one direction; the edge is repeated."""
    side = int(pixels_BSS3.shape[1])
    largest = round(side * _SHIFT)
    rows, columns = (
        [min(max(place + shift, 0), side - 1) for place in range(side)]
        for shift in rng.integers(-largest, largest + 1, 2).tolist()
    )
    return pixels_BSS3[:, rows][:, :, columns]


def _check_labels(what: str, count: int, labels: NDArray[np.int64], num_classes: int) -> None:
    if not count or len(labels) != count:
        raise UserError(f"{what}: {count} images with {len(labels)} labels; give images with one label each")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"{what}: labels from {labels.min()} to {labels.max()}, expected 0..{num_classes - 1}; images without "
            "labels cannot teach a classifier"
        )
