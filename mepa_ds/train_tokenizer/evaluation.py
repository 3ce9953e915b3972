"""Measures the held-out quality of a tokenizer in training, with a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mepa_ds import distributed
from mepa_ds.data.images import ImageBatch
from mepa_ds.distributed import sum_over_ranks
from mepa_ds.evaluation.tokenizer.reconstruction import ReconstructionScores
from mepa_ds.images.pictures import signed_to_uint8
from mepa_ds.images.sheets import Pixels, draw_sheet
from mepa_ds.tokenizer import Tokenizer

_GRID_IMAGES, _COLUMNS = 16, 8


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: Tokenizer,
    batches: Iterable[ImageBatch],
    max_images: int,
    gives_up: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Any], Tensor] | None:
    """Encodes and decodes up to `max_images` images over all ranks. Collective, but only at its end.

    Returns None, on every rank, when `gives_up` returned true on some rank before a batch. Otherwise returns the
    metrics of `ReconstructionScores.report`, without LPIPS, and this rank's first images with their reconstructions,
    (2, B, 3, H, W) in [-1, 1].
    """
    device = next(tokenizer.parameters()).device
    scores = ReconstructionScores(tokenizer)
    gave_up = torch.zeros((), device=device)
    budget = -(-max_images // distributed.world_size())
    shown_2B3HW: Tensor | None = None
    for batch in batches:
        if gives_up():
            gave_up += 1
            break
        images_B3HW = batch.to(device).images_B3HW[:budget]
        budget -= len(images_B3HW)
        tokens_BL = tokenizer.encode(images_B3HW)
        copies_B3HW = tokenizer.decode(tokens_BL)
        scores.add(images_B3HW, copies_B3HW, tokens_BL)
        if shown_2B3HW is None:
            shown_2B3HW = torch.stack([images_B3HW[:_GRID_IMAGES], copies_B3HW[:_GRID_IMAGES]])
        if not budget:
            break
    if sum_over_ranks(gave_up):
        return None
    metrics = scores.report(sum_over_ranks)
    side = tokenizer.config.image_side
    return metrics, torch.zeros(2, 0, 3, side, side) if shown_2B3HW is None else shown_2B3HW


def reconstruction_sheet(shown_2B3HW: Tensor, title: str) -> Pixels:
    """A picture that alternates rows of eight images and rows of their reconstructions, both in [-1, 1]."""
    originals, copies = (list(signed_to_uint8(images_B3HW)) for images_B3HW in shown_2B3HW)
    tiles, captions = [], []
    for start in range(0, len(originals), _COLUMNS):
        tiles += [originals[start : start + _COLUMNS], copies[start : start + _COLUMNS]]
        captions += ["held-out", "reconstructed"]
    return draw_sheet(tiles, title=title, rows=captions).pixels_HW3
