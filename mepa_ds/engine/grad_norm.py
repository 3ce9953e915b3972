"""The norm of the gradients, by which they are clipped: DeepSpeed's number for a fraction of its work.

DeepSpeed copies each gradient to fp64 for its norm, after it has read each twice to look for values that are not
finite. Here each is read once, and a norm that is not finite tells of such values (benchmarks/optimizer.py).

This file replaces methods of DeepSpeed's ZeRO optimizer, one instance's: the version is pinned.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK = 2**17
"""Elements that are squared at a time on a CPU, so that they stay in its cache."""
_NOT_FINITE = -1.0
"""By this, DeepSpeed knows that a group's norm is not finite."""


def sum_of_squares(gradients: list[Tensor]) -> Tensor:
    """Returns the fp32 sum of all squares, as a scalar; infinite or NaN if a value is, or beyond 1e19.

    Sums are formed in a tree, so that fp32 keeps 6 digits and more whatever their length.
    """
    if not gradients:
        return torch.zeros(())
    if gradients[0].is_cuda:
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
    chunks = (chunk for gradient in gradients for chunk in gradient.reshape(-1).split(_CHUNK))
    return torch.stack([chunk.float().square().sum() for chunk in chunks]).double().sum().float()


def take_over_norm(zero: Any) -> None:
    """Makes DeepSpeed's ZeRO optimizer compute norms by `sum_of_squares`, and judge by them whether to step."""

    def norm_over_ranks(gradients: list[Tensor], params: list[Tensor], norm_type: float = 2) -> Tensor:
        """Returns one parameter group's norm over all ranks. Collective."""
        assert norm_type == 2
        own = [gradient.detach() for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        total = sum_of_squares(own).to(zero.device)
        dist.all_reduce(total, group=zero.dp_process_group)
        return torch.where(total.isfinite(), total.sqrt(), _NOT_FINITE)

    def check_overflow(partition_gradients: bool = True) -> None:
        """Does nothing: `step` takes a norm that is not finite for an overflow."""

    zero.get_grad_norm_direct = norm_over_ranks
    if zero.compute_grad_norm:  # a user's DeepSpeed file may turn it off
        zero.check_overflow = check_overflow
