"""What is known before anything is chosen: of the images and of the machine, as values. Modules beside find them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Colour = Literal["grey", "colour", "mixed"]
Kind = Literal["digits", "folder", "shards", "ready_shards"]


@dataclass(frozen=True)
class ImageFacts:
    """Of a folder, a shard set, or scikit-learn's digits."""

    source: str
    """As the user gave it, absolute."""
    kind: Kind
    """`ready_shards`: image sets for training and held out, of squares of one size, that are used where they are."""
    train_words: tuple[str, ...]
    """Words of `mepa data build` that read the training images; of `ready_shards` the set's directory."""
    heldout_words: tuple[str, ...]
    """The same of images that are held out already; none: a share of the training images is to be held out."""
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    """Images of each class that has some, to train on, before some are held out."""
    sides: tuple[int, int, int]
    """Shorter sides in pixels of the images that were opened: the smallest, the median, the largest."""
    sizes: dict[str, int]
    """Histogram: opened images by the range of their shorter side."""
    num_opened: int
    colour: Colour
    unreadable: tuple[str, ...] = ()
    """Of the opened ones: what is wrong, by file."""
    notes: tuple[str, ...] = ()
    """What else should be said of them."""

    @property
    def num_images(self) -> int:
        return sum(self.counts)

    @property
    def singles(self) -> int:
        """Classes with one image, of which none can be held out."""
        return self.counts.count(1)

    @property
    def side(self) -> int:
        """The median shorter side."""
        return self.sides[1]


@dataclass(frozen=True)
class MachineFacts:
    """What the run may use."""

    cores: int = 2
    gflops: float = 60.0
    """Matrix products of one core, in 1e9 operations a second."""
    gpus: int = 0
    """0: train on the CPU."""
    gpu_gigabytes: float = 80.0
    """Memory of each."""
    gpu_tflops: float = 300.0
    """Peak of each in bf16; what is not in the list of vendors' peaks counts as a small one."""
