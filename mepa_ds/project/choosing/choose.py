"""From facts to choices, by one pure function. docs/own_images.md explains each rule; the numbers were measured there.

What is known to work stays as it is: the digits get the quickstart's recipes, ImageNet's layout on GPUs the published
one. Between them, small networks on a CPU get as many steps as fit into the time, and GPUs a preset by the number of
images.
"""

from __future__ import annotations

from dataclasses import replace

from mepa_ds.errors import UserError
from mepa_ds.project.choosing.choices import Choices, Teacher
from mepa_ds.project.choosing.large import choose_large
from mepa_ds.project.choosing.small import DEFAULT_MINUTES, SIZES, choose_small
from mepa_ds.project.looking.facts import ImageFacts, MachineFacts
from mepa_ds.safety.text import printable

SIDES = (32, 64, 128, 256)


def choose(
    images: ImageFacts,
    machine: MachineFacts,
    minutes: float | None = None,
    side: int | None = None,
    teacher: Teacher | None = None,
) -> Choices:
    """Chooses. `minutes`: for all stages together (None: `DEFAULT_MINUTES` on a CPU, by epochs on GPUs).

    Raises:
        UserError: a time of nothing, or a side that there is no tokenizer for.
    """
    if minutes is not None and not minutes > 0:
        raise UserError(
            f"--minutes: expected more than 0, got {minutes:g}; {DEFAULT_MINUTES:g} is the default on a CPU"
        )
    if side is not None and side not in SIDES:
        raise UserError(f"--side: expected one of {', '.join(map(str, SIDES))}, got {side}")
    if images.kind == "digits" and side is None and teacher is None:
        return _digits()
    side = side or _side(images, machine)
    if side > 64 and not machine.gpus:
        if images.kind == "ready_shards":
            raise UserError(
                f"{printable(images.source)}: the sets hold squares of {images.side} pixels, and tokens of such images "
                "are made on GPUs; give --gpus N, or smaller ones: mepa data build webdataset --shards SET --out NEW "
                "--image-side 64"
            )
        raise UserError(f"--side {side}: tokens of such images are made on GPUs; give --gpus N, or --side 64")
    if images.kind == "ready_shards" and side != images.side:
        raise UserError(
            f"--side {side}: the sets in {images.source} hold squares of {images.side} pixels; leave it out"
        )
    chosen = choose_large(images, machine, side, minutes) if side > 64 else choose_small(images, machine, side, minutes)
    if teacher is not None and teacher != chosen.teacher:
        chosen = replace(chosen, teacher=teacher, why={**chosen.why, "teacher": "as asked by --teacher"})
    return chosen


def _side(images: ImageFacts, machine: MachineFacts) -> int:
    if images.kind == "ready_shards":
        return images.side
    if images.side <= 40:
        return 32
    if not machine.gpus or images.side <= 80:
        return 64
    return 128 if images.side <= 180 else 256


def _digits() -> Choices:
    """The quickstart's, which are known to work: recipes/quickstart.yaml and recipes/tokenizer_quickstart.yaml."""
    return Choices(
        side=32, scales=(1, 2, 3, 4), codebook_size=128, code_width=16, multipliers=(1, 1, 2, 2),
        tokenizer_steps=400, tokenizer_batch=16, preset=None, size=SIZES[0], steps=400, epochs=None, batch=64,
        accumulation=1, base_lr=8e-3, is_short=False, teacher="patch-pca", guidance_until=None, guidance_scales=(2, 3),
        ranks=2, threads=1, ep_size=2, precision="fp32", heldout="given", heldout_share=1 / 6, classifier=True,
        cfg=1.5, log_every=20, evaluate_every=50, checkpoint_every=100, sample_every=100,
        seconds={"shards": 10, "tokenizer": 75, "precompute": 30, "pretraining": 80, "samples": 25, "scores": 40},
        why={
            "side": "the digits have 8 x 8 pixels, and are enlarged to 32 x 32",
            "scales": "30 tokens an image: 8 x 8 pixels have no detail for more",
            "codebook": "few codes, so that each is seen often",
            "steps": "17 passes over 1498 images; with more the model learns them by heart",
            "guidance": "constant: where images repeat, it holds back learning them by heart (docs/guidance.md)",
            "teacher": "principal components of image patches: fitted in seconds, no download",
        },
    )  # fmt: skip
