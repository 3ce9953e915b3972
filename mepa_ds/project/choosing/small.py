"""Networks that a CPU trains in minutes, with a tokenizer of their own: as many steps as fit into the time."""

from __future__ import annotations

from dataclasses import dataclass

from mepa_ds.config.model import ModelConfig
from mepa_ds.objective.flops import FORWARD_AND_BACKWARD, forward_flops
from mepa_ds.project.choosing.choices import Choices, Size, Teacher, heldout_of, power_of_two, train_images
from mepa_ds.project.looking.facts import ImageFacts, MachineFacts

DEFAULT_MINUTES = 12.0
"""Of a run on a CPU."""

# Shares of a core's matrix products that training reaches, measured (docs/own_images.md).
_TOKENIZER_EFFICIENCY, _MODEL_EFFICIENCY, _ENCODING_EFFICIENCY = 0.33, 0.21, 0.45
_STARTS = 110.0
"""Seconds that do not depend on lengths: starts of some ten commands."""
_CLASSIFIED = 0.77
"""Images of 32 pixels that the classifier is fitted on, in all its passes, for each 1e9 operations."""
_MOST_OF_CLASSIFIER = 1 / 3
"""Of the time; one that would take longer is left out."""
_TOKENIZER_SHARE = {32: 0.4, 64: 0.55}  # of the time of both trainings, by side
_IMAGES_FOR_TEACHER = 50
_EPOCHS_BY_HEART = 30
"""From so many passes on, the held-out score is best long before the pictures are."""
_TOKENIZER_BATCH = {32: 16, 64: 8}
_STEPS, _TOKENIZER_STEPS = (200, 6000), (200, 2000)
_EPOCHS_OF_GUIDANCE = 10
"""From so many passes over the images on, guidance holds back learning by heart (docs/guidance.md)."""
_MOST_EPOCHS, _FEWEST_STEPS = 40, 400
"""A longer run learns the images by heart; a shorter one learns nothing."""
_MOST_TOKENIZER_EPOCHS = 300


@dataclass(frozen=True)
class Grid:
    """A tokenizer that is trained here."""

    scales: tuple[int, ...]
    multipliers: tuple[int, ...]
    gflop: float
    """Of a forward pass of one image, at 32 channels; a test counts it."""


GRIDS = {
    "coarse-32": Grid((1, 2, 3, 4), (1, 1, 2, 2), 0.247),
    "fine-32": Grid((1, 2, 4, 8), (1, 1, 2), 0.277),
    "fine-64": Grid((1, 2, 4, 8), (1, 1, 2, 2), 0.991),
}
_COARSE_UP_TO = 16
"""Images of so few pixels have no detail for more than 4 x 4 tokens."""


SIZES = (Size(4, 128, 4), Size(6, 192, 6), Size(8, 256, 8))
_STEPS_BEFORE_SIZE = 2000
"""A longer run is worth more in a larger model."""
_IMAGES_FOR_SIZE = (0, 3000, 30_000)


def _rounded(steps: float, limits: tuple[int, int]) -> int:
    """Whole fifties within the limits."""
    return int(min(max(steps // 50 * 50, limits[0]), limits[1]))


def _judges(images: ImageFacts, heldout: str, num_train: int) -> bool:
    classes = len(images.classes)
    return 2 <= classes <= 200 and heldout != "none" and images.singles == 0 and num_train >= 15 * classes


def choose_small(images: ImageFacts, machine: MachineFacts, side: int, minutes: float | None) -> Choices:
    """Networks that a CPU trains in minutes, with a tokenizer of their own."""
    heldout, share = heldout_of(images)
    num_train = train_images(images, heldout, share)
    grid = GRIDS["fine-64" if side == 64 else "coarse-32" if images.side <= _COARSE_UP_TO else "fine-32"]
    ranks = min(machine.gpus or power_of_two(min(machine.cores, 4)), power_of_two(num_train))
    ranks = power_of_two(ranks)
    codebook = 128 if images.colour == "grey" else 256
    batch = max(min(power_of_two(num_train), 32 if not machine.gpus else 256), ranks)
    usual = 64 if machine.gpus else _TOKENIZER_BATCH[side]
    tokenizer_batch = max(min(power_of_two(num_train), usual), ranks)
    speed, budget = _speed(machine), 60 * (minutes or DEFAULT_MINUTES)
    scoring = 15 + num_train * (side / 32) ** 2 / (_CLASSIFIED * speed)
    classifier = _judges(images, heldout, num_train) and scoring < _MOST_OF_CLASSIFIER * budget
    starts = _STARTS + (scoring if classifier else 0) + images.num_images / 600
    trained = max(budget - starts, 0.2 * budget)
    tokenizer_image = FORWARD_AND_BACKWARD * grid.gflop / (speed * _TOKENIZER_EFFICIENCY)
    most = min(_STEPS[1], max(_MOST_EPOCHS * num_train // batch, _FEWEST_STEPS))
    # What few images leave of the model's share is the tokenizer's.
    needed = most * batch * _gflop(SIZES[0], grid, codebook) / (speed * _MODEL_EFFICIENCY)
    for_tokenizer = trained - min((1 - _TOKENIZER_SHARE[side]) * trained, needed)
    most_passes = max(_MOST_TOKENIZER_EPOCHS * num_train // tokenizer_batch, _TOKENIZER_STEPS[0])
    limits = _TOKENIZER_STEPS[0], min(_TOKENIZER_STEPS[1], most_passes)
    tokenizer_steps = _rounded(for_tokenizer / (tokenizer_image * tokenizer_batch), limits)
    left = trained - tokenizer_steps * tokenizer_image * tokenizer_batch
    size, steps, model_image = _size_and_steps(
        grid, codebook, left * speed * _MODEL_EFFICIENCY / batch, most, num_train
    )
    epochs = steps * batch / num_train
    repeats, part = epochs >= _EPOCHS_OF_GUIDANCE, max(steps // 5, 1)  # steps are whole fifties
    model_seconds = steps * batch * model_image / (speed * _MODEL_EFFICIENCY)
    teacher: Teacher = "patch-pca" if num_train >= _IMAGES_FOR_TEACHER else "none"
    seconds = {
        "shards": 15 + images.num_images / 1500,
        "tokenizer": 10 + tokenizer_steps * tokenizer_batch * tokenizer_image,
        "precompute": 35 + images.num_images * grid.gflop / (speed * _ENCODING_EFFICIENCY),
        "pretraining": 15 + model_seconds,
        "samples": 30,
    } | ({"scores": scoring} if classifier else {})
    return Choices(
        side=side, scales=grid.scales, codebook_size=codebook, code_width=16, multipliers=grid.multipliers,
        tokenizer_steps=tokenizer_steps, tokenizer_batch=tokenizer_batch, preset=None, size=size, steps=steps,
        epochs=None, batch=batch, accumulation=1, base_lr=_base_lr(size, batch), is_short=not repeats, teacher=teacher,
        guidance_until=None if repeats else 0.25, guidance_scales=(2, 3), ranks=ranks,
        threads=1 if machine.gpus else max(machine.cores // ranks, 1), ep_size=min(ranks, 2), precision="fp32",
        heldout=heldout, heldout_share=share, classifier=classifier, cfg=1.5, log_every=20,
        evaluate_every=steps if epochs >= _EPOCHS_BY_HEART else part, checkpoint_every=part, sample_every=part,
        seconds=seconds,
        why=_why(images, machine, grid, codebook, (num_train, steps, batch, model_seconds)),
    )  # fmt: skip


def _why(
    images: ImageFacts, machine: MachineFacts, grid: Grid, codebook: int, length: tuple[int, int, int, float]
) -> dict[str, str]:
    """Comments by choice. `length`: images, steps, batch, and seconds of the model's training."""
    num_train, steps, batch, seconds = length
    epochs, pixels = steps * batch / num_train, 2 ** (len(grid.multipliers) - 1)
    large = images.side > 1.5 * pixels * grid.scales[-1] and not machine.gpus
    on = f"{machine.gpus} GPUs" if machine.gpus else f"{machine.cores} cores"
    by_heart = "at the end alone: with few images the held-out score is best long before the pictures are"
    return {
        "side": f"half of the images have a shorter side of {images.side} pixels or more"
        + ("; larger ones would take a CPU hours" if large else ""),
        "scales": f"{sum(side * side for side in grid.scales)} tokens an image, the finest {pixels} x {pixels} pixels",
        "codebook": "grey images need few codes" if codebook == 128 else "colours need more codes than grey images",
        "steps": f"{epochs:.3g} passes over {num_train} images, in about {seconds / 60:.0f} min on {on}",
        "size": f"the largest of {len(SIZES)} sizes that gets enough images and steps",
        "guidance": "constant: where images repeat, it holds back learning them by heart (docs/guidance.md)"
        if epochs >= _EPOCHS_OF_GUIDANCE
        else "ends after a quarter: in a short run on fresh images it costs (docs/guidance.md)",
        "evaluate": by_heart if epochs >= _EPOCHS_BY_HEART else "",
        "teacher": "principal components of image patches: fitted in seconds, no download"
        if num_train >= _IMAGES_FOR_TEACHER
        else f"{num_train} images are too few to fit a teacher",
    }


def _speed(machine: MachineFacts) -> float:
    """1e9 operations a second of all cores or GPUs together; small networks leave most of a GPU idle."""
    if machine.gpus:
        return machine.gpus * 1000 * machine.gpu_tflops * 0.02
    return machine.gflops * min(machine.cores, 4 * max(machine.cores // 4, 1))


def _size_and_steps(
    grid: Grid, codebook: int, gflops_a_batch_image: float, most: int, num_train: int
) -> tuple[Size, int, float]:
    """The largest size that has images enough and gets steps enough; its steps, and 1e9 operations an image."""
    chosen: tuple[Size, int, float] | None = None
    for size, needed in zip(SIZES, _IMAGES_FOR_SIZE, strict=True):
        gflop = _gflop(size, grid, codebook)
        steps = gflops_a_batch_image / gflop
        if chosen is None or (num_train >= needed and steps >= _STEPS_BEFORE_SIZE):
            chosen = size, _rounded(steps, (min(_STEPS[0], max(most, 50)), max(most, 50))), gflop
    assert chosen is not None
    return chosen


def _gflop(size: Size, grid: Grid, codebook: int) -> float:
    """1e9 operations of an image, forward and backward."""
    model = ModelConfig(
        depth=size.depth, width=size.width, num_heads=size.num_heads, scales=grid.scales, codebook_size=codebook,
        code_width=16, moe={"expert_ratio": 1.0},  # type: ignore[arg-type]
    )  # fmt: skip
    return FORWARD_AND_BACKWARD * forward_flops(model) / 1e9


def _base_lr(size: Size, batch: int) -> float:
    """At a batch of 256: 2e-3 at the run's own batch, for width 128, falling with the width."""
    return float(f"{2e-3 * 128 / size.width * 256 / batch:.2g}")
