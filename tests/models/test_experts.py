"""The grouped products and the loop over experts, against one expert after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mepa_ds.models.moe.expert_loop import looped_experts
from mepa_ds.models.moe.experts import NoRowsNoGradient, grouped_experts


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [9, 0, 0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("implementation", ["loop", "grouped"])
def test_experts_equal_one_expert_after_the_other(implementation: str, counts: list[int]) -> None:
    """Both implementations, also for experts without rows and for no rows at all: outputs and gradients to 1e-5."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(counts), 16), (4, 24, 16), (4, 24), (4, 16, 24), (4, 16)]
    tensors = [(0.3 * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]
    x_RC, w1_EFC, b1_EF, w2_ECF, b2_EC = tensors
    rows, start = [], 0
    for e, count in enumerate(counts):
        for row in range(start, start + count):
            hidden = F.gelu(w1_EFC[e] @ x_RC[row] + b1_EF[e], approximate="tanh")
            rows.append(w2_ECF[e] @ hidden + b2_EC[e])
        start += count
    expected_RC = torch.stack(rows) if rows else x_RC * 0
    if implementation == "grouped":
        y_RC = grouped_experts(tensors, torch.tensor(counts))
    else:
        y_RC = looped_experts(tensors, counts)
    torch.testing.assert_close(y_RC, expected_RC, atol=1e-5, rtol=1e-5)
    gradient_RC = torch.randn(y_RC.shape, generator=generator)
    found = torch.autograd.grad(y_RC, tensors, gradient_RC)
    wanted = torch.autograd.grad(expected_RC, tensors, gradient_RC, allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, atol=1e-5, rtol=1e-5)


def test_what_grouped_products_leave_for_experts_without_rows_is_no_gradient() -> None:
    weight = torch.randn(3, 4, 2, requires_grad=True)
    garbage = torch.randn(3, 4, 2)
    garbage[1] = float("nan")
    NoRowsNoGradient.apply(weight, torch.tensor([5, 0, 1])).backward(garbage)
    assert weight.grad is not None
    assert torch.equal(weight.grad[[0, 2]], garbage[[0, 2]])
    assert not weight.grad[1].any()


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.one_of(st.integers(0, 5), st.integers(30, 70)), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_padded_rows_leave_no_trace(counts: list[int], dtype: torch.dtype) -> None:
    """In low precision a CPU's products have more rows than an expert has; against fp32 on the same values."""
    generator = torch.Generator().manual_seed(sum(counts))
    shapes = [(sum(counts), 16), (len(counts), 24, 16), (len(counts), 24), (len(counts), 16, 24), (len(counts), 16)]
    low = [(0.3 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes]
    high = [tensor.detach().float().requires_grad_() for tensor in low]
    gradient_RC = torch.randn(shapes[0], generator=generator).to(dtype)
    found_RC = looped_experts(low, counts)
    with torch.no_grad():
        alone_RC = looped_experts(low, counts)
    expected_RC = looped_experts(high, counts)
    torch.testing.assert_close(alone_RC.float(), expected_RC, atol=0.02 * _largest(expected_RC), rtol=0)
    found = [found_RC, *torch.autograd.grad(found_RC, low, gradient_RC)]
    expected = [expected_RC, *torch.autograd.grad(expected_RC, high, gradient_RC.float())]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        if ours.numel():
            tolerance = 0.02 * _largest(theirs)  # what rounding gives; another expert's row would be all of it
            torch.testing.assert_close(ours.float(), theirs, atol=tolerance, rtol=0)


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
