"""How well a tokenizer reconstructs images: PSNR, SSIM, LPIPS, and the use of its codebook.

Shape legend: B batch, H = W side of the image, N images seen so far, S scales, V codebook size, L tokens over all
scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mepa_ds.precision import full_fp32
from mepa_ds.tokenizer.tokenizer import Tokenizer
from mepa_ds.tokenizer.usage import CodebookUsage, perplexity

_LEAST_MSE = 1e-10  # of an exact copy: 100 dB
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(images_B3HW: Tensor, copies_B3HW: Tensor) -> Tensor:
    """(B,) fp64: dB, 10 log10(1 / mse) with pixels in [0, 1]; at most 100. Both are in [-1, 1]."""
    mse_B = ((copies_B3HW - images_B3HW) / 2).double().square().mean((1, 2, 3)).clamp(min=_LEAST_MSE)
    return -10 * mse_B.log10()


def ssim(images_B3HW: Tensor, copies_B3HW: Tensor) -> Tensor | None:
    """(B,) fp64: structural similarity (Wang et al. 2004), mean over channels and places. Both are in [-1, 1].

    A Gaussian window of 11 x 11 pixels with deviation 1.5, only where it fits into the image: None for smaller images.
    It is torchmetrics' default, which is not used because its import alone takes longer than these sums.
    """
    if min(images_B3HW.shape[-2:]) < _WINDOW:
        return None
    offsets = torch.arange(_WINDOW, device=images_B3HW.device, dtype=torch.float64) - _WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    window = window / window.sum()

    def blurred(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)[:, None]
        rows = F.conv2d(flat, window.view(1, 1, -1, 1))
        return F.conv2d(rows, window.view(1, 1, 1, -1)).view(*x.shape[:2], rows.shape[-2], -1)

    # Variances are differences of near numbers: float64.
    x, y = ((pixels.double() + 1) / 2 for pixels in (images_B3HW, copies_B3HW))
    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return (luminance * (2 * covariance + _C2) / (variance_x + variance_y + _C2)).mean((1, 2, 3))


class ReconstructionScores:
    """Gathers the scores of images and their reconstructions, batch by batch.

    `of_image` holds the scores of each image by name: psnr, ssim for images of at least 11 pixels, lpips with a
    network. `lpips` maps two batches (B, 3, H, W) in [-1, 1] to distances (B, 1, 1, 1).
    """

    def __init__(self, tokenizer: Tokenizer, lpips: nn.Module | None = None):
        device = next(tokenizer.parameters()).device
        self._lpips = lpips
        # With decay 0 and one update, the usage holds the frequencies of exactly these images.
        self._usage = CodebookUsage(tokenizer.schedule, tokenizer.config.codebook_size, decay=0.0).to(device)
        self._hits_SV = torch.zeros_like(self._usage.mean_SV)
        self._parts: dict[str, list[Tensor]] = {"psnr": []}

    @torch.no_grad()
    def add(self, images_B3HW: Tensor, copies_B3HW: Tensor, tokens_BL: Tensor) -> None:
        """A batch of images in [-1, 1], what the tokenizer made of them, and its tokens."""
        found = {"psnr": psnr(images_B3HW, copies_B3HW), "ssim": ssim(images_B3HW, copies_B3HW)}
        if self._lpips is not None:
            with full_fp32():
                found["lpips"] = self._lpips(images_B3HW, copies_B3HW).double().flatten()
        for name, values_B in found.items():
            if values_B is not None:
                self._parts.setdefault(name, []).append(values_B)
        self._hits_SV += self._usage.hits_of(tokens_BL)

    @property
    def of_image(self) -> dict[str, Tensor]:
        """By name: (N,) fp64."""
        return {name: torch.cat(parts) for name, parts in self._parts.items() if parts}

    def report(self, summed: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Any]:
        """The means over images, and the use of the codebook.

        `summed` sums a tensor over ranks, each of which has images of its own; it is called on all ranks alike.

        - `psnr` (dB), `ssim`, `lpips`: means over images, as far as they were computed;
        - `codebook_use_by_scale`, `codebook_use`: share of codes in [0, 1] that occur at all, at each scale and over
          all scales;
        - `perplexity_by_scale`, `perplexity`: exp of the entropy of the codes at each scale and over all scales;
        - `num_images`: the number of images over all ranks.
        """
        hits_SV = summed(self._hits_SV)
        means: dict[str, float] = {}
        count = 0.0
        for name in ("psnr", "ssim", "lpips"):
            values_N = torch.cat([hits_SV.new_zeros(0, dtype=torch.float64), *self._parts.get(name, [])])
            total, number = summed(torch.stack([values_N.sum(), values_N.new_tensor(len(values_N))])).tolist()
            if number:
                means[name], count = total / number, max(count, number)
        self._usage.mean_SV.zero_()
        self._usage.num_updates_S.zero_()
        self._usage.update(hits_SV)
        return {
            **means,
            "codebook_use_by_scale": (hits_SV > 0).float().mean(1).tolist(),
            "codebook_use": float((hits_SV.sum(0) > 0).float().mean()),
            "perplexity_by_scale": [perplexity(frequency_V) for frequency_V in self._usage.frequency_SV],
            "perplexity": perplexity(self._usage.frequency_V),
            "num_images": int(count),
        }
