"""Semantic guidance: aggregated residual features against a frozen teacher's patches (MEPA, L_SG).

Shapes: B batch, L positions, C model width, P teacher width, N = G x G teacher patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mepa_ds.scales import ScaleSchedule

# Below this length a vector counts as zero: the cosine's gradient, which grows with 1 / length, stays within fp16.
NORM_EPS = 1e-4


class Projector(nn.Sequential):
    """MLP m: C -> hidden -> hidden -> P with SiLU, as REPA's. It is trained with the model and not exported."""

    def __init__(self, width: int, hidden: int, teacher_width: int):
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, teacher_width)
        )


def aggregates(z_BLP: Tensor, schedule: ScaleSchedule, grid_side: int, last_scale: int) -> Iterator[Tensor]:
    """z_j = sum_{i <= j} Up(z_i, G x G), bicubic, for j = 0..last_scale (0-based): (B, P, G, G) fp32 each.

    VAR's token maps are residuals, so one scale alone is no image; the sum up to it is.
    """
    total: Tensor | None = None
    for scale in range(last_scale + 1):
        start, end = schedule.bounds[scale]
        side = schedule.sides[scale]
        z_BPss = z_BLP[:, start:end].float().transpose(1, 2).unflatten(2, (side, side))
        if side != grid_side:
            z_BPss = F.interpolate(z_BPss, size=(grid_side, grid_side), mode="bicubic")
        total = z_BPss if total is None else total + z_BPss
        yield total


def alignment_loss(z_BLP: Tensor, features_BNP: Tensor, schedule: ScaleSchedule, scales: Sequence[int]) -> Tensor:
    """L_SG = -mean over images and patches of sum_{j in F} cos(g^n, z_j^n), cosine over channels, in fp32.

    z_BLP: projected hidden states of all positions (those past max(F) are not read). features_BNP: the teacher's
    patch map, N a square number. scales: F, 1-based. Range [-|F|, |F|].
    """
    grid_side = round(features_BNP.shape[1] ** 0.5)
    assert grid_side * grid_side == features_BNP.shape[1], "teacher patches must form a square grid"
    teacher = F.normalize(features_BNP.float(), dim=-1)
    cosine = z_BLP.new_zeros((), dtype=torch.float32)
    for scale, z_BPGG in enumerate(aggregates(z_BLP, schedule, grid_side, max(scales) - 1), start=1):
        if scale in scales:
            z_BNP = F.normalize(z_BPGG.flatten(2).transpose(1, 2), dim=-1, eps=NORM_EPS)
            cosine = cosine + (z_BNP * teacher).sum(-1).mean()
    return -cosine
