"""The kernel that computes a linear layer with its GELU, against the two operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mepa_ds.models import feed_forward
from mepa_ds.models.feed_forward import FeedForward, gelu


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 64), (1, 64), (0, 64)])
def test_without_gradients_the_result_is_the_same(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = FeedForward(64, 256).to(dtype), torch.randn(shape).to(dtype)
    expected = layer(x)
    assert expected.requires_grad
    calls: list[Tensor] = []
    original = feed_forward.has_fused_kernel

    def has_fused_kernel(x: Tensor) -> bool:
        if original(x):
            calls.append(x)
        return original(x)

    monkeypatch.setattr(feed_forward, "has_fused_kernel", has_fused_kernel)
    with torch.no_grad():
        found = layer(x)
        assert len(calls) == (dtype in feed_forward.fused_gelu_types() and len(x) > 0)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16  # autocast knows nothing of the kernel
    torch.testing.assert_close(found, expected.detach(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2**-7)]
)
@pytest.mark.parametrize("shape", [(5, 7), (0, 3), (300, 257)])
def test_gelu_and_its_gradient(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    """Against PyTorch's, in a wider type; also far from 0, where tanh and sigmoid are flat."""
    torch.manual_seed(0)
    x = (8 * torch.randn(shape)).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    found, expected = gelu(x), F.gelu(wide, approximate="tanh")
    gradient = torch.randn(shape).to(dtype)
    (found_gradient,) = torch.autograd.grad(found, x, gradient)
    (expected_gradient,) = torch.autograd.grad(expected, wide, gradient.double())
    assert found.dtype == found_gradient.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found_gradient.double(), expected_gradient, atol=tolerance, rtol=tolerance)


def test_gelu_of_values_that_are_not_finite() -> None:
    x = torch.tensor([float("inf"), float("nan")], requires_grad=True)
    found = gelu(x)
    assert found[0] == float("inf")
    assert found[1].isnan()
