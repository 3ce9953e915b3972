"""Random numbers by purpose, not by process.

Every random decision of a run is a function of (seed, purpose, item), so it is the same on any number of ranks and
workers and after any resume. No global generator is touched.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

SPLITMIX64_INCREMENT = np.uint64(0x9E3779B97F4A7C15)


def _key(seed: int, *purpose: object) -> int:
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one named purpose, for instance (seed, "init", parameter name)."""
    return torch.Generator().manual_seed(_key(seed, *purpose) >> 1)


def uniforms(seed: int, purpose: str, items_B: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """(B, count) numbers in [0, 1), a pure function of (seed, purpose, item, column): SplitMix64 as a counter hash."""
    columns = np.arange(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        state = items_B.astype(np.uint64)[:, None] * np.uint64(count) + columns
        mixed = splitmix64(splitmix64(state) ^ np.uint64(_key(seed, purpose)))
    return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of SplitMix64 for each element: a bijection that mixes 64 bits, the same on every machine."""
    x = x + SPLITMIX64_INCREMENT
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
