"""Attention by prefixes: the same values as slices under autograd, to the bit, and gradients to rounding. Of Markovian
attention, values and gradients against a mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mepa_ds.models.attention import own_scale_attention, prefix_attention
from mepa_ds.scales import ScaleSchedule


def by_slices(q: Tensor, k: Tensor, v: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Autograd forms the gradients of the slices."""
    parts = [
        F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], scale=0.5)
        for start, end in schedule.bounds
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def by_a_mask(q: Tensor, k: Tensor, v: Tensor, schedule: ScaleSchedule) -> Tensor:
    scale_L = schedule.scale_index_L()
    mask_LL = scale_L[:, None] >= scale_L
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LL, scale=0.5).transpose(1, 2)


@pytest.mark.parametrize("sides", [(1,), (2,), (1, 2, 3), (1, 2, 3, 4, 5, 6, 8)])
@pytest.mark.parametrize("frozen", ["", "k", "qv"])
def test_prefixes_equal_slices_and_a_mask(sides: tuple[int, ...], frozen: str) -> None:
    schedule = ScaleSchedule.of(sides)
    torch.manual_seed(0)
    inputs = {name: torch.randn(2, 3, schedule.num_tokens, 8, requires_grad=name not in frozen) for name in "qkv"}
    q, k, v = inputs.values()
    out_BLHD = prefix_attention(q, k, v, schedule.bounds, 0.5)
    slices_BLHD, masked_BLHD = by_slices(q, k, v, schedule), by_a_mask(q, k, v, schedule)
    assert torch.equal(out_BLHD, slices_BLHD)
    torch.testing.assert_close(out_BLHD, masked_BLHD, atol=1e-5, rtol=1e-5)
    gradient, wanted = torch.randn_like(out_BLHD), [x for x in inputs.values() if x.requires_grad]
    ours = torch.autograd.grad(out_BLHD, wanted, gradient)
    for found, theirs in zip(ours, torch.autograd.grad(slices_BLHD, wanted, gradient), strict=True):
        torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)
    for found, theirs in zip(ours, torch.autograd.grad(masked_BLHD, wanted, gradient), strict=True):
        torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sides", [(1,), (2,), (1, 2, 3), (1, 2, 3, 4, 5, 6, 8)])
def test_the_own_scale_equals_a_mask(sides: tuple[int, ...]) -> None:
    schedule = ScaleSchedule.of(sides)
    scale_L = schedule.scale_index_L()
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, schedule.num_tokens, 8, requires_grad=True) for _ in range(3)]
    q, k, v = inputs
    found = own_scale_attention(q, k, v, schedule.bounds, 0.5)
    mask_LL = scale_L[:, None] == scale_L
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LL, scale=0.5).transpose(1, 2)
    gradient = torch.randn_like(found)
    pairs = zip(*(torch.autograd.grad(out, inputs, gradient) for out in (found, expected)), strict=True)
    for ours, theirs in [(found, expected), *pairs]:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", [prefix_attention, own_scale_attention])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_less_with_gradients(dtype: torch.dtype, attention: Callable[..., Tensor]) -> None:
    """On a CPU they are computed in fp32: values and gradients are those of fp32, rounded once."""
    schedule = ScaleSchedule.of((1, 2, 3, 4))
    torch.manual_seed(0)
    low = [torch.randn(2, 3, schedule.num_tokens, 8).to(dtype).requires_grad_() for _ in range(3)]
    high = [x.detach().float().requires_grad_() for x in low]
    found, expected = (attention(q, k, v, schedule.bounds, 0.5) for q, k, v in (low, high))
    gradient = torch.randn(expected.shape).to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))
    ours, theirs = torch.autograd.grad(found, low, gradient), torch.autograd.grad(expected, high, gradient.float())
    assert all(torch.equal(g, e.to(dtype)) for g, e in zip(ours, theirs, strict=True))
    with torch.no_grad():  # in their own type
        alone = attention(low[0], low[1], low[2], schedule.bounds, 0.5)
    torch.testing.assert_close(alone, found.detach(), atol=0.02, rtol=0.02)
