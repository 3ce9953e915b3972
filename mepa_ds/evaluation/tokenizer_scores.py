"""Scores of a tokenizer on held-out images, for `mepa evaluate-tokenizer`: one pass, then the distances.

Shape legend: B batch, H = W side of the image, N images, D features, S scales, R resamples.
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
from mepa_ds.evaluation.feature_spaces import FeatureSpace
from mepa_ds.evaluation.formulas import Gaussian, frechet_distance
from mepa_ds.evaluation.reconstruction import ReconstructionScores
from mepa_ds.images.pictures import to_uint8
from mepa_ds.images.sheets import Pixels, draw_sheet, resized
from mepa_ds.tokenizer.tokenizer import Tokenizer

_RESAMPLES, _SEED = 1000, 0
_FD_RESAMPLES, _FD_WIDTH = 50, 256  # an interval of a wider space would take hours
_LEAST_IMAGES = 2


@dataclass(frozen=True)
class TokenizerScores:
    """What `score_tokenizer` found."""

    scores: dict[str, Any]
    """`ReconstructionScores.report`; `intervals`: [low, high] at 95 % by name; `fd`: by feature space, with the facts
    of each; `notes`: what a reader must know of them."""
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
        UserError: there are fewer than two images.
    """
    device = next(tokenizer.parameters()).device
    gathered = ReconstructionScores(tokenizer, lpips)
    features: dict[str, tuple[list[Tensor], list[Tensor]]] = {space.name: ([], []) for space in spaces}
    left, shown = max_images, list[Tensor]()
    for batch in batches:
        images_B3HW = batch.to(device).images_B3HW[:left]
        tokens_BL = tokenizer.encode(images_B3HW)
        copies_B3HW = tokenizer.decode(tokens_BL)
        gathered.add(images_B3HW, copies_B3HW, tokens_BL)
        for space in spaces:
            originals, copies = features[space.name]
            originals.append(space(batch.pixels_B3HW[:left].permute(0, 2, 3, 1).numpy()))
            copies.append(space(to_uint8(copies_B3HW.add(1).div(2))))
        shown.append(images_B3HW[: max(num_shown - sum(map(len, shown)), 0)].cpu())
        left -= len(images_B3HW)
        on_images(len(images_B3HW))
        if left <= 0:
            break
    if max_images - left < _LEAST_IMAGES:
        raise UserError(f"{max_images - left} images: at least {_LEAST_IMAGES} are needed for scores")
    scores = gathered.report()
    scores["intervals"] = {name: mean_interval(values_N) for name, values_N in gathered.of_image.items()}
    scores["fd"], notes = {}, list[str]()
    for space in spaces:
        originals_ND, copies_ND = (torch.cat(parts) for parts in features[space.name])
        scores["fd"][space.name] = {"value": _distance(originals_ND, copies_ND, device), **space.facts()}
        if len(originals_ND) <= space.width:
            notes.append(
                f"{space.name}: {len(originals_ND)} images are too few for {space.width} features: the distance is too "
                f"small or too large, and to be compared at equal numbers only; use more than {space.width}"
            )
        if space.width <= _FD_WIDTH:
            scores["intervals"][f"fd {space.name}"] = _distance_interval(originals_ND, copies_ND)
        else:
            notes.append(f"{space.name}: no interval: resampling {space.width} features would take hours")
    if "ssim" not in scores:
        notes.append("ssim: needs images of at least 11 pixels")
    return TokenizerScores({**scores, "notes": notes}, torch.cat(shown))


def mean_interval(values_N: Tensor, resamples: int = _RESAMPLES) -> tuple[float, float]:
    """The 95 % interval of a mean, by bootstrap over images, seeded."""
    values = values_N.cpu().numpy()
    rng = np.random.default_rng(_SEED)
    means_R = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means_R, (0.025, 0.975))
    return float(low), float(high)


def _distance(originals_ND: Tensor, copies_ND: Tensor, device: torch.device | str = "cpu") -> float:
    real, copy = Gaussian.of(originals_ND), Gaussian.of(copies_ND)
    return frechet_distance(real.mean, real.covariance, copy.mean, copy.covariance, device)


def _distance_interval(originals_ND: Tensor, copies_ND: Tensor) -> tuple[float, float]:
    """An image and its copy are drawn together: their difference is what is measured."""
    rng = np.random.default_rng(_SEED)
    found_R = []
    for _ in range(_FD_RESAMPLES):
        drawn_N = torch.from_numpy(rng.integers(0, len(originals_ND), len(originals_ND)))
        found_R.append(_distance(originals_ND[drawn_N], copies_ND[drawn_N]))
    low, high = np.quantile(found_R, (0.025, 0.975))
    return float(low), float(high)


@torch.no_grad()
def reconstruction_scales(tokenizer: Tokenizer, images_B3HW: Tensor) -> tuple[NDArray[np.uint8], list[float]]:
    """(S, B, H, W, 3): what is decoded of the token maps up to each scale; and the mean PSNR of each scale in dB."""
    from mepa_ds.evaluation.reconstruction import psnr

    device = next(tokenizer.parameters()).device
    images_B3HW = images_B3HW.to(device)
    steps, quality = [], []
    for copies_B3HW in tokenizer.decode_scales(tokenizer.encode(images_B3HW)):
        steps.append(to_uint8(copies_B3HW.add(1).div(2)))
        quality.append(float(psnr(images_B3HW, copies_B3HW).mean()))
    return np.stack(steps), quality


def tokenizer_sheet(tokenizer: Tokenizer, shown_B3HW: Tensor, title: str, least_side: int = 64) -> Pixels:
    """A row for each image in [-1, 1]: the original, then what each scale adds; the last one is the reconstruction."""
    steps_SBHW3, quality = reconstruction_scales(tokenizer, shown_B3HW)
    columns = [list(to_uint8(shown_B3HW.add(1).div(2))), *map(list, steps_SBHW3)]
    sides = tokenizer.schedule.sides
    titles = ["original", *(f"to {side} x {side}\n{mean:.1f} dB" for side, mean in zip(sides, quality, strict=True))]
    most = 128
    if columns[0][0].shape[0] > most:  # ten scales of 256 pixels would be a wide picture
        columns = [[resized(tile, most) for tile in column] for column in columns]
    return draw_sheet(list(zip(*columns, strict=True)), title=title, columns=titles, least_side=least_side).pixels_HW3
