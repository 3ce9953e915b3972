"""Vectors made with VAR's own code, and the deterministic weights they were made with.

`fixtures/var/var_keys.json` holds, for official and tiny checkpoints, the state dict's keys in order with shapes;
`fixtures/var/var_tiny.npz` what VAR's code computes in fp32 on a CPU for the tiny models with these weights.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

FOLDER = Path(__file__).parent / "fixtures" / "var"
TINY_SCALES = (1, 2, 3, 4)
# Of pixels in 0..1. The tiny decoder amplifies rounding: 5e-4 between one thread and two, 4e-4 between processors.
PIXEL_ATOL = 1e-3


@cache
def vectors() -> NpzFile:
    return np.load(FOLDER / "var_tiny.npz")


def vector(name: str) -> Tensor:
    return torch.from_numpy(vectors()[name].copy())


@cache
def key_tables() -> dict[str, dict[str, list[int]]]:
    """Checkpoint name -> key -> shape, in the state dict's order."""
    return json.loads((FOLDER / "var_keys.json").read_text())


def fixture_state(name: str) -> dict[str, Tensor]:
    """The deterministic state dict of a tiny model: the n-th key is a sine over its elements with phase 0.7 n."""
    return {key: _weight(key, shape, n) for n, (key, shape) in enumerate(key_tables()[name].items())}


def random_state(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Random values in the shapes of an official checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.02 * torch.randn(shape, generator=generator) for key, shape in key_tables()[name].items()}


def _weight(key: str, shape: list[int], n: int) -> Tensor:
    count = math.prod(shape)
    i = torch.arange(count, dtype=torch.float64)
    wave = torch.sin(12.9898 * i + 0.7 * n)
    if key.endswith(("zero_k_bias", "ema_vocab_hit_SV")):
        value = torch.zeros_like(wave)
    elif key.endswith("scale_mul_1H11"):
        value = math.log(4) + 0.1 * torch.sin(i)
    elif key == "quantize.embedding.weight":
        value = 0.8 * wave
    elif key == "lvl_1L":
        return torch.repeat_interleave(torch.arange(len(TINY_SCALES)), torch.tensor([s * s for s in TINY_SCALES]))[None]
    elif key == "attn_bias_for_masking":
        level = torch.repeat_interleave(torch.arange(len(TINY_SCALES)), torch.tensor([s * s for s in TINY_SCALES]))
        return torch.where(level[:, None] >= level[None], 0.0, -torch.inf)[None, None]
    elif len(shape) > 1:
        value = wave / math.sqrt(count / shape[0])
    else:
        value = 0.1 * wave + (1.0 if key.endswith("weight") else 0.0)
    return value.reshape(shape).float()
