"""Measures the held-out quality of a tokenizer: PSNR, use of the codebook, and a picture.

Shape legend: B batch, H = W side of the image, S scales, V codebook size, L tokens over all scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mepa_ds import distributed
from mepa_ds.data.images import ImageBatch
from mepa_ds.distributed import sum_over_ranks
from mepa_ds.files import atomic_path
from mepa_ds.tokenizer import Tokenizer
from mepa_ds.tokenizer.usage import CodebookUsage, perplexity

_GRID_IMAGES = 16


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: Tokenizer,
    batches: Iterable[ImageBatch],
    max_images: int,
    gives_up: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Any], Tensor] | None:
    """Encodes and decodes up to `max_images` images over all ranks. Collective, but only at its end.

    Returns None, on every rank, when `gives_up` returned true on some rank before a batch. Otherwise returns metrics:
        - `psnr`: dB, mean over images of `10 log10(1 / mse)`, pixels in [0, 1];
        - `codebook_use_by_scale`, `codebook_use`: share of codes in [0, 1] that occur at all, at each scale and over
          all scales;
        - `perplexity`: exp of the entropy of the codes over all scales;
        - `num_images`: the number of images over all ranks;
        and a grid (3, h, w) in [-1, 1] of this rank's first images, with originals above their reconstructions.
    """
    device = next(tokenizer.parameters()).device
    # With decay 0 and one update, the usage holds the frequencies of exactly these images.
    usage = CodebookUsage(tokenizer.schedule, tokenizer.config.codebook_size, decay=0.0).to(device)
    hits_SV = torch.zeros_like(usage.mean_SV)
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    budget = -(-max_images // distributed.world_size())
    grid = torch.zeros(3, 0, 0)
    for batch in batches:
        if gives_up():
            totals[2] += 1
            break
        images_B3HW = batch.to(device).images_B3HW[:budget]
        budget -= len(images_B3HW)
        tokens_BL = tokenizer.encode(images_B3HW)
        reconstruction_B3HW = tokenizer.decode(tokens_BL)
        mse_B = ((reconstruction_B3HW - images_B3HW) / 2).double().square().mean((1, 2, 3)).clamp(min=1e-10)
        totals[:2] += torch.stack([(-10 * mse_B.log10()).sum(), totals.new_tensor(len(mse_B))])
        hits_SV += usage.hits_of(tokens_BL)
        if not grid.numel():
            grid = reconstruction_grid(images_B3HW[:_GRID_IMAGES], reconstruction_B3HW[:_GRID_IMAGES])
        if not budget:
            break
    hits_SV, totals = sum_over_ranks(hits_SV), sum_over_ranks(totals)
    if totals[2]:
        return None
    usage.update(hits_SV)
    metrics = {
        "psnr": float(totals[0] / totals[1]),
        "codebook_use_by_scale": (hits_SV > 0).float().mean(1).tolist(),
        "codebook_use": float((hits_SV.sum(0) > 0).float().mean()),
        "perplexity": perplexity(usage.frequency_V),
        "num_images": int(totals[1]),
    }
    return metrics, grid


def reconstruction_grid(images_B3HW: Tensor, reconstruction_B3HW: Tensor) -> Tensor:
    """Returns a picture (3, h, w) that alternates rows of eight images and rows of their reconstructions."""
    rows = []
    for originals, copies in zip(images_B3HW.cpu().split(8), reconstruction_B3HW.cpu().split(8), strict=True):
        rows += [torch.cat(list(originals), dim=2), torch.cat(list(copies), dim=2)]
    width = max(row.shape[2] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[2]), value=1.0) for row in rows], dim=1)


def save_image(image_3HW: Tensor, path: Path) -> None:
    """Writes an image in [-1, 1] as PNG."""
    pixels_HW3 = ((image_3HW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    with atomic_path(path) as temporary:
        Image.fromarray(pixels_HW3.contiguous().numpy()).save(temporary, format="PNG")
