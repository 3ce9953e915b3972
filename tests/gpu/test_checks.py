"""The CUDA paths against the CPU, on a GPU. Without pytest: python benchmarks/gpu_parts/checks.py."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_parts.checks import CHECKS


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_a_gpu_computes_what_a_cpu_computes(name: str) -> None:
    CHECKS[name](torch.device("cuda"))
