"""Products of fp32 numbers in full, on GPUs that would round their factors to TF32's ten bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
