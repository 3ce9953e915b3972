"""PSNR, SSIM and the use of the codebook against sums written out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mepa_ds.evaluation.tokenizer.reconstruction import ReconstructionScores, psnr, ssim
from tests.tiny_run import CODEBOOK, SCALES, make_tokenizer


def pictures(count: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, height, width, generator=generator) * 2 - 1
    return images, (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def test_psnr_is_a_mean_square_in_decibels() -> None:
    images, copies = pictures(2, 5, 6)
    for number, value in enumerate(psnr(images, copies).tolist()):
        pixels = zip(images[number].flatten().tolist(), copies[number].flatten().tolist(), strict=True)
        mse = math.fsum(((a - b) / 2) ** 2 for a, b in pixels) / images[number].numel()
        assert value == pytest.approx(-10 * math.log10(mse), rel=1e-5)
    assert psnr(images, images).tolist() == [100, 100]


def test_ssim_equals_a_loop_over_windows() -> None:
    images, copies = pictures(2, 13, 12)
    found = ssim(images, copies)
    assert found is not None
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    for number in range(2):
        values = []
        x, y = ((pixels[number].double().numpy() + 1) / 2 for pixels in (images, copies))
        for channel in range(3):
            for top in range(3):
                for left in range(2):
                    a, b = (p[channel, top : top + 11, left : left + 11] for p in (x, y))
                    mean_a, mean_b = (window * a).sum(), (window * b).sum()
                    var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                    both = (window * (a - mean_a) * (b - mean_b)).sum()
                    top_half = (2 * mean_a * mean_b + 0.01**2) * (2 * both + 0.03**2)
                    values.append(top_half / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)))
        assert float(found[number]) == pytest.approx(np.mean(values), rel=1e-9)
    identical = ssim(images, images)
    assert identical is not None
    torch.testing.assert_close(identical, torch.ones(2, dtype=torch.float64))
    assert ssim(*pictures(1, 10, 20)) is None


def test_scores_do_not_depend_on_batches_and_count_codes(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    images, copies = pictures(4, 6, 6)
    tokens = torch.randint(0, CODEBOOK, (4, 14), generator=torch.Generator().manual_seed(1))
    whole, parts = ReconstructionScores(tokenizer), ReconstructionScores(tokenizer)
    whole.add(images, copies, tokens)
    for part in (slice(0, 1), slice(1, 4)):
        parts.add(images[part], copies[part], tokens[part])
    report = whole.report()
    assert report == parts.report() == parts.report(), "reporting changes nothing"
    assert report["num_images"] == 4
    assert "ssim" not in report
    counts = torch.bincount(tokens[:, 5:].flatten(), minlength=CODEBOOK).double()
    share = counts / counts.sum()
    assert report["perplexity_by_scale"][2] == pytest.approx(math.exp(float(torch.special.entr(share).sum())), rel=1e-5)
    assert report["codebook_use_by_scale"][2] == pytest.approx(float((counts > 0).double().mean()))
    assert len(report["perplexity_by_scale"]) == len(SCALES)
    doubled = whole.report(lambda sums: 2 * sums)
    assert (doubled["psnr"], doubled["num_images"]) == (report["psnr"], 8), "as two ranks with the same images"


def test_lpips_is_taken_as_it_is(tmp_path: Path) -> None:
    class Distance(torch.nn.Module):
        def forward(self, images: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
            return (images - copies).abs().mean((1, 2, 3), keepdim=True)

    images, copies = pictures(3, 6, 6)
    scores = ReconstructionScores(make_tokenizer(tmp_path / "tokenizer"), Distance())
    scores.add(images, copies, torch.zeros(3, 14, dtype=torch.int64))
    assert scores.report()["lpips"] == pytest.approx(float((images - copies).abs().mean()), rel=1e-6)
