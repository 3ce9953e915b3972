"""Averages gradients over ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_BYTES = 64 * 2**20


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces gradients by their mean over ranks, in buckets of 64 MiB. Collective.

    This is done by hand and not by DDP, because the adversarial step runs several backward passes over parts of the
    graph, and gradient accumulation needs one reduction per step, not one per pass.
    """
    if not dist.is_initialized():
        return
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            continue
        bucket.append(parameter.grad)
        size += parameter.grad.nbytes
        if size >= _BUCKET_BYTES:
            _average(bucket)
            bucket, size = [], 0
    if bucket:
        _average(bucket)


def _average(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))
