"""How much the tokens of each scale count in the cross-entropy."""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mepa_ds.scales import ScaleSchedule

Over = Literal["tokens", "scales", "log_normal"]


@cache
def token_weights(over: Over, schedule: ScaleSchedule, device: torch.device) -> Tensor:
    """(L,) fp32 weights of the tokens, with a mean of 1 over all of them. They are made once a device.

    Args:
        over: `tokens`: all count the same; `scales`: all scales do; `log_normal`: scales count as in HMAR.
    """
    shares_S = {
        "tokens": lambda: np.array(schedule.lengths, dtype=float),
        "scales": lambda: np.ones(schedule.num_scales),
        "log_normal": lambda: _log_normal(schedule.sides),
    }[over]()
    a_token_S = shares_S / shares_S.sum() * sum(schedule.lengths) / np.array(schedule.lengths)
    return torch.from_numpy(np.repeat(a_token_S, schedule.lengths)).float().to(device)


def _log_normal(sides: tuple[int, ...]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """HMAR's weights of the scales (arXiv 2506.04421, and its program's `norm_dist_equivalent`).

    With the sides' z-scores z_1 < ... < z_S, scale s counts exp(-z_(S+1-s)^2 / 2). As sides grow about geometrically,
    that is a bell over the scales' logarithms.
    """
    if len(sides) < 2:  # one scale has no deviation
        return np.ones(len(sides))
    ratios = np.array(sides) / sides[-1]
    z_S = (ratios - ratios.mean()) / ratios.std(ddof=1)
    return np.asarray(np.exp(-(z_S[::-1] ** 2) / 2) / math.sqrt(2 * math.pi))
