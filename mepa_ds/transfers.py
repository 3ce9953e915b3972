"""Copies from the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def copied_to(tensor: Tensor, device: torch.device, non_blocking: bool = True) -> Tensor:
    """Copies through pinned memory to a GPU: from other memory the copy would wait for all work queued there."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=non_blocking)
