"""Cross-entropy in chunks against PyTorch's own on fp32 logits."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from mepa_ds.objective.cross_entropy import token_losses, token_scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_elements", [1, 40, 1 << 19])
def test_scores_and_gradients(dtype: torch.dtype, chunk_elements: int) -> None:
    """1e-6 in the losses; the gradient is rounded once, to the logits' type."""
    torch.manual_seed(0)
    logits_BLV = (5 * torch.randn(2, 7, 16)).to(dtype).requires_grad_()
    tokens_BL, gradient_BL = torch.randint(16, (2, 7)), 1000 * torch.rand(2, 7)
    with patch("mepa_ds.objective.cross_entropy._CPU_CHUNK_ELEMENTS", chunk_elements):
        ce_BL, hits_BL = token_scores(logits_BLV, tokens_BL)
        (found,) = torch.autograd.grad(ce_BL, logits_BLV, gradient_BL)
    values_BLV = logits_BLV.detach().float().requires_grad_()
    expected_BL = F.cross_entropy(values_BLV.transpose(1, 2), tokens_BL, reduction="none")
    (expected,) = torch.autograd.grad(expected_BL, values_BLV, gradient_BL)
    assert ce_BL.dtype == hits_BL.dtype == torch.float32
    torch.testing.assert_close(ce_BL, expected_BL, atol=1e-6, rtol=1e-6)
    assert torch.equal(hits_BL, (values_BLV.argmax(-1) == tokens_BL).float())
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(found.float(), expected, atol=1000 * 1e-6, rtol=tolerance)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("chunk_elements", [40, 1 << 19])
def test_smoothed_labels(smoothing: float, chunk_elements: int) -> None:
    """1e-6; the cross-entropy beside the loss is that without smoothing, and has no gradient."""
    torch.manual_seed(0)
    logits_BLV = (5 * torch.randn(2, 7, 16)).requires_grad_()
    tokens_BL, gradient_BL = torch.randint(16, (2, 7)), torch.rand(2, 7)
    with patch("mepa_ds.objective.cross_entropy._CPU_CHUNK_ELEMENTS", chunk_elements):
        loss_BL, ce_BL, hits_BL = token_losses(logits_BLV, tokens_BL, smoothing)
        (found,) = torch.autograd.grad(loss_BL, logits_BLV, gradient_BL)
    expected_BL = F.cross_entropy(logits_BLV.transpose(1, 2), tokens_BL, reduction="none", label_smoothing=smoothing)
    (expected,) = torch.autograd.grad(expected_BL, logits_BLV, gradient_BL)
    torch.testing.assert_close(loss_BL, expected_BL, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(ce_BL, token_scores(logits_BLV, tokens_BL)[0])
    assert not ce_BL.requires_grad
    assert not hits_BL.requires_grad


def test_logits_that_are_not_finite_show() -> None:
    logits_BLV = torch.zeros(1, 3, 4)
    logits_BLV[0, 1, 2] = float("nan")
    ce_BL, hits_BL = token_scores(logits_BLV, torch.zeros(1, 3, dtype=torch.int64))
    assert ce_BL.isnan().tolist() == [[False, True, False]]
    assert not hits_BL.requires_grad


def test_what_stays_for_the_backward_pass_is_not_in_fp32() -> None:
    kept: list[torch.Tensor] = []
    logits_BLV = torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        token_scores(logits_BLV, torch.zeros(2, 5, dtype=torch.int64))
    assert sum(x.numel() for x in kept if x.dtype == torch.float32) == 2 * 5
