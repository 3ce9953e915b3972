"""What hardware can do in a precision, and fp32 products in full on GPUs that would round their factors to TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mepa_ds.errors import UserError

_LEAST_CAPABILITY = 7
"""CUDA compute capability (major) with fp16 that DeepSpeed accepts."""


def is_supported(precision: str, device: torch.device) -> bool:
    """Whether this processor or GPU trains in `precision` ("fp32", "bf16" or "fp16"). DeepSpeed asks the same of it.

    Most CPUs have no fp16: oneDNN wants AVX-512 FP16 or AMX FP16.
    """
    if precision == "fp16":
        if device.type == "cuda":
            return torch.cuda.get_device_capability(device)[0] >= _LEAST_CAPABILITY
        try:
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
        except (AttributeError, RuntimeError):  # a build of PyTorch without oneDNN
            return False
    return precision != "bf16" or device.type != "cuda" or torch.cuda.is_bf16_supported()


def refusal(precision: str, device: torch.device) -> UserError | None:
    """What is wrong with `parallel.precision` on this rank's device; None if it can be used."""
    if is_supported(precision, device):
        return None
    name = "this CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    others = [other for other in ("bf16", "fp32") if is_supported(other, device)]
    return UserError(f"parallel.precision: {name} cannot train in {precision}; set it to {' or '.join(others)}")


@contextmanager
def full_fp32() -> Iterator[None]:
    """fp32 convolutions and matrix products inside are not TF32; what the user has set comes back afterwards.

    cuDNN's convolutions are TF32 by default: a rounded distance is another token, and FID moves. Costs microseconds.
    """
    convolution = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    matmul = torch.backends.cuda.matmul
    conv_before, matmul_before = convolution.fp32_precision, matmul.fp32_precision
    # torch refuses to run products that its older and its newer switch disagree on, and the older one sets both.
    try:
        older_before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer one was used alone
        older_before = None
    convolution.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        convolution.fp32_precision = conv_before
        if older_before is not None:
            torch.set_float32_matmul_precision(older_before)
        matmul.fp32_precision = matmul_before
