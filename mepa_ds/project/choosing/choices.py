"""What is chosen, as one value; and what all rules share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from mepa_ds.data_tools.readers.source import num_heldout
from mepa_ds.project.looking.facts import ImageFacts

Heldout = Literal["given", "split", "none"]
Teacher = Literal["none", "patch-pca", "contrastive", "dinov2-b"]

HELDOUT_SHARE = 0.1
_MOST_HELDOUT = 50_000
PUBLISHED_TOKENIZER = "vae_ch160v4096z32"


@dataclass(frozen=True)
class Size:
    depth: int
    width: int
    num_heads: int


@dataclass(frozen=True)
class Choices:
    """Everything that recipes and commands are written from."""

    side: int
    scales: tuple[int, ...]
    codebook_size: int
    code_width: int
    multipliers: tuple[int, ...] | None
    """Of a tokenizer that is trained; None: VAR's published one."""
    tokenizer_steps: int
    tokenizer_batch: int
    preset: str | None
    """Of the model; None: `size`."""
    size: Size | None
    steps: int | None
    epochs: int | None
    """One of both."""
    batch: int
    accumulation: int
    base_lr: float
    is_short: bool
    """A run of few steps on fresh images: a head and a warm-up that learn quickly, and no stochastic depth."""
    teacher: Teacher
    guidance_until: float | None
    guidance_scales: tuple[int, ...]
    ranks: int
    threads: int
    ep_size: int
    precision: Literal["bf16", "fp32"]
    heldout: Heldout
    heldout_share: float
    classifier: bool
    """Whether samples are judged by a classifier of the images themselves."""
    cfg: float
    log_every: int
    evaluate_every: int
    checkpoint_every: int
    sample_every: int | None
    seconds: dict[str, float] = field(default_factory=dict)
    """Expected, by stage; empty where nothing is known."""
    why: dict[str, str] = field(default_factory=dict)
    """By what was chosen: the comment in the recipe."""

    @property
    def is_published(self) -> bool:
        """Whether VAR's tokenizer file makes the tokens."""
        return self.multipliers is None


def heldout_of(images: ImageFacts) -> tuple[Heldout, float]:
    """Where held-out images come from, and the share of each class that a split takes."""
    share = min(HELDOUT_SHARE, _MOST_HELDOUT / images.num_images)
    if images.heldout_words:
        return "given", share
    return ("none" if max(images.counts) < 2 else "split"), share


def train_images(images: ImageFacts, heldout: Heldout, share: float) -> int:
    """How many are left to train on."""
    if heldout != "split":
        return images.num_images
    return sum(count - num_heldout(count, share) for count in images.counts)


def power_of_two(number: float) -> int:
    """The largest that is not above it; at least 1."""
    return 1 << max(int(math.log2(max(number, 1))), 0)
