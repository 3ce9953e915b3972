"""VAR's published tokenizer and a preset of the model, on GPUs."""

from __future__ import annotations

import math

from mepa_ds.config.model import SCALES_256, ModelConfig
from mepa_ds.objective.flops import FORWARD_AND_BACKWARD, forward_flops
from mepa_ds.project.choosing.choices import Choices, heldout_of, power_of_two, train_images
from mepa_ds.project.looking.facts import ImageFacts, MachineFacts

_GPU_MFU = 0.3


def choose_large(images: ImageFacts, machine: MachineFacts, side: int, minutes: float | None) -> Choices:
    """VAR's tokenizer and a preset, on GPUs."""
    heldout, share = heldout_of(images)
    num_train = train_images(images, heldout, share)
    is_imagenet = num_train >= 1_000_000 and len(images.classes) >= 500 and side == 256
    depth, seen = (16, 128e6) if num_train >= 300_000 else (12, 40e6) if num_train >= 20_000 else (8, 10e6)
    ranks = min(machine.gpus, power_of_two(num_train))
    wanted = 768 if num_train >= 100_000 else 256
    each = round(wanted / ranks)
    if wanted % ranks or each > num_train // ranks:
        each = max(min(each // 8 * 8 or 1, num_train // ranks), 1)
    epochs = 100 if is_imagenet else int(min(max(round(seen / num_train), 1), 400))
    scales = SCALES_256 if side == 256 else tuple(scale for scale in SCALES_256 if scale <= side // 16)
    if minutes is not None:
        flops = FORWARD_AND_BACKWARD * forward_flops(ModelConfig(preset=f"mepa-d{depth}", scales=scales))
        a_second = ranks * machine.gpu_tflops * 1e12 * _GPU_MFU / flops
        epochs = int(min(epochs, max(60 * minutes * a_second // num_train, 1)))
    num_steps = epochs * num_train // (each * ranks)
    every = min(2500, max(num_steps // 20, 1))
    return Choices(
        side=side, scales=scales, codebook_size=4096, code_width=32, multipliers=None, tokenizer_steps=0,
        tokenizer_batch=0, preset=f"mepa-d{depth}", size=None, steps=None, epochs=epochs, batch=each * ranks,
        accumulation=1, base_lr=1e-4, is_short=False, teacher="dinov2-b", guidance_until=None,
        guidance_scales=(5, 6, 7), ranks=ranks, threads=1, ep_size=math.gcd(ranks, 8), precision="bf16",
        heldout=heldout, heldout_share=share, classifier=False, cfg=1.5, log_every=50, evaluate_every=every,
        checkpoint_every=every, sample_every=None,
        why={
            "side": f"half of the images have a shorter side of {images.side} pixels or more",
            "scales": f"VAR's: {sum(side * side for side in scales)} tokens an image, the finest of 16 x 16 pixels",
            "codebook": "that of VAR's published tokenizer",
            "steps": "the published run's length" if is_imagenet else f"{epochs} passes over {num_train} images",
            "size": "the published size" if is_imagenet else f"{num_train} images are too few for more",
            "guidance": "MEPA's weight and scales (SG-M)",
            "teacher": "DINOv2, as in MEPA",
        },
    )  # fmt: skip
