"""Scores of a tokenizer on held-out images, for `mepa evaluate-tokenizer`: one pass, then the distances.

Shape legend: B batch, H = W side of the image, N images, D features, S scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mepa_ds.data.images import ImageBatch
from mepa_ds.errors import UserError
from mepa_ds.evaluation.feature_spaces import INCEPTION, FeatureSpace
from mepa_ds.evaluation.formulas.gaussian import FrechetTo, Gaussian
from mepa_ds.evaluation.measures import with_error
from mepa_ds.evaluation.tokenizer.reconstruction import ReconstructionScores, psnr
from mepa_ds.images.pictures import signed_to_uint8
from mepa_ds.images.sheets import Pixels, draw_sheet, resized
from mepa_ds.tokenizer.tokenizer import Tokenizer

_LEAST_IMAGES = 2


@dataclass(frozen=True)
class TokenizerScores:
    """What `score_tokenizer` found."""

    scores: dict[str, Any]
    """`ReconstructionScores.report`, and `rfid` for the space inception, `NAME.rfd` for any other; of each score that
    is of images also its standard error and 95 % interval over images, `NAME_error`, `NAME_low` and `NAME_high`."""
    spaces: dict[str, dict[str, object]]
    """The facts of the feature spaces, by name."""
    notes: list[str]
    """What a reader must know of the numbers."""
    shown_B3HW: Tensor
    """The first images, in [-1, 1]."""


@torch.no_grad()
def score_tokenizer(
    tokenizer: Tokenizer,
    batches: Iterable[ImageBatch],
    max_images: int,
    spaces: Sequence[FeatureSpace] = (),
    lpips: nn.Module | None = None,
    num_shown: int = 8,
    on_images: Callable[[int], object] = lambda count: None,
) -> TokenizerScores:
    """Encodes and decodes up to `max_images` images. `on_images` is called with the number of images of each batch.

    Raises:
        UserError: there are fewer than two images, or a reconstruction is not finite.
    """
    device = next(tokenizer.parameters()).device
    gathered = ReconstructionScores(tokenizer, lpips)
    features: dict[str, tuple[list[Tensor], list[Tensor]]] = {space.name: ([], []) for space in spaces}
    left, shown = max_images, list[Tensor]()
    for batch in batches:
        images_B3HW = batch.to(device).images_B3HW[:left]
        tokens_BL = tokenizer.encode(images_B3HW)
        copies_B3HW = tokenizer.decode(tokens_BL)
        _check_finite(copies_B3HW, max_images - left)
        gathered.add(images_B3HW, copies_B3HW, tokens_BL)
        for space in spaces:
            originals, copies = features[space.name]
            originals.append(space(batch.pixels_B3HW[:left].permute(0, 2, 3, 1).numpy()))
            copies.append(space(signed_to_uint8(copies_B3HW)))
        shown.append(images_B3HW[: max(num_shown - sum(map(len, shown)), 0)].cpu())
        left -= len(images_B3HW)
        on_images(len(images_B3HW))
        if left <= 0:
            break
    if max_images - left < _LEAST_IMAGES:
        raise UserError(f"{max_images - left} images: at least {_LEAST_IMAGES} are needed for scores")
    scores, notes = gathered.report(), list[str]()
    for name, values_N in gathered.of_image.items():
        scores |= with_error(name, float(values_N.mean()), float(values_N.std()) / len(values_N) ** 0.5)
    for space in spaces:
        originals_ND, copies_ND = (torch.cat(parts).to(device) for parts in features[space.name])
        name = "rfid" if space.name == INCEPTION else f"{space.name}.rfd"
        scores |= with_error(name, *FrechetTo(Gaussian.of(originals_ND), device).distance(copies_ND))
        if len(originals_ND) <= space.width:
            notes.append(
                f"{name}: {len(originals_ND)} images are fewer than the covariance of {space.width} features needs "
                f"({space.width + 1}); compare only with equally many"
            )
    if "ssim" not in scores:
        notes.append("ssim: needs images of at least 11 pixels")
    return TokenizerScores(scores, {space.name: space.facts() for space in spaces}, notes, torch.cat(shown))


def _check_finite(copies_B3HW: Tensor, first: int) -> None:
    finite_B = copies_B3HW.isfinite().flatten(1).all(1)
    if not finite_B.all():
        number = first + int((~finite_B).nonzero()[0])
        raise UserError(
            f"image {number} is reconstructed with values that are not finite: the tokenizer's weights are damaged"
        )


@torch.no_grad()
def reconstruction_scales(tokenizer: Tokenizer, images_B3HW: Tensor) -> tuple[NDArray[np.uint8], list[float]]:
    """(S, B, H, W, 3): what is decoded of the token maps up to each scale; and the mean PSNR of each scale in dB."""
    device = next(tokenizer.parameters()).device
    images_B3HW = images_B3HW.to(device)
    steps, quality = [], []
    for copies_B3HW in tokenizer.decode_scales(tokenizer.encode(images_B3HW)):
        steps.append(signed_to_uint8(copies_B3HW))
        quality.append(float(psnr(images_B3HW, copies_B3HW).mean()))
    return np.stack(steps), quality


def tokenizer_sheet(tokenizer: Tokenizer, shown_B3HW: Tensor, title: str, least_side: int = 64) -> Pixels:
    """A row for each image in [-1, 1]: the original, then what each scale adds; the last one is the reconstruction."""
    steps_SBHW3, quality = reconstruction_scales(tokenizer, shown_B3HW)
    columns = [list(signed_to_uint8(shown_B3HW)), *map(list, steps_SBHW3)]
    sides = tokenizer.schedule.sides
    titles = ["original", *(f"to {side} x {side}\n{mean:.1f} dB" for side, mean in zip(sides, quality, strict=True))]
    most = 128
    if columns[0][0].shape[0] > most:  # ten scales of 256 pixels would be a wide picture
        columns = [[resized(tile, most) for tile in column] for column in columns]
    return draw_sheet(list(zip(*columns, strict=True)), title=title, columns=titles, least_side=least_side).pixels_HW3
