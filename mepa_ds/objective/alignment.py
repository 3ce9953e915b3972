"""Semantic guidance: aggregated residual features against a frozen teacher's patches (MEPA, L_SG).

Shapes: B batch, L positions, C model width, P teacher width, N = G x G teacher patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mepa_ds.scales import ScaleSchedule, bicubic_matrix

# Below this length a vector counts as zero: the cosine's gradient, which grows with 1 / length, stays within fp16.
NORM_EPS = 1e-4


class Projector(nn.Sequential):
    """MLP m: C -> hidden -> hidden -> P with SiLU, as REPA's. It is trained with the model and not exported."""

    def __init__(self, width: int, hidden: int, teacher_width: int):
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, teacher_width)
        )


def aggregates(z_BLP: Tensor, schedule: ScaleSchedule, grid_side: int, scales: Sequence[int]) -> Iterator[Tensor]:
    """z_j = sum_{i <= j} Up(z_i, G x G), bicubic, for each 1-based j of `scales`, in growing order: (B, N, P) fp32.

    VAR's token maps are residuals, so one scale alone is no image; the sum up to it is. The scales between two
    aggregates are enlarged and added by one product with a fixed matrix.
    """
    total_BNP: Tensor | None = None
    first = 0
    for last in sorted(set(scales)):
        sides = schedule.sides[first:last]
        matrix_Nl = torch.cat([bicubic_matrix(side, grid_side, z_BLP.device) for side in sides], dim=1)
        z_BlP = z_BLP[:, schedule.bounds[first][0] : schedule.bounds[last - 1][1]].float()
        matrix_BNl = matrix_Nl.expand(len(z_BlP), -1, -1)
        total_BNP = matrix_BNl @ z_BlP if total_BNP is None else torch.baddbmm(total_BNP, matrix_BNl, z_BlP)
        first = last
        yield total_BNP


def cosine_maps(
    z_BLP: Tensor, features_BNP: Tensor, schedule: ScaleSchedule, scales: Sequence[int]
) -> Iterator[Tensor]:
    """cos(g^n, z_j^n) over channels for each 1-based j of `scales`, in growing order: (B, N) fp32, without autocast.

    Arguments as of `alignment_loss`.
    """
    grid_side = round(features_BNP.shape[1] ** 0.5)
    assert grid_side * grid_side == features_BNP.shape[1], "teacher patches must form a square grid"
    teacher_BNP = F.normalize(features_BNP.float(), dim=-1)
    for z_BNP in aggregates(z_BLP, schedule, grid_side, scales):
        length_BN = torch.linalg.vector_norm(z_BNP, dim=-1).clamp_min(NORM_EPS)
        yield (z_BNP * teacher_BNP).sum(-1) / length_BN


def alignment_loss(z_BLP: Tensor, features_BNP: Tensor, schedule: ScaleSchedule, scales: Sequence[int]) -> Tensor:
    """L_SG = -mean over images and patches of sum_{j in F} cos(g^n, z_j^n), cosine over channels, in fp32.

    z_BLP: projected hidden states of all positions (those past max(F) are not read). features_BNP: the teacher's
    patch map, N a square number. scales: F, 1-based. Range [-|F|, |F|].
    """
    cosine = z_BLP.new_zeros((), dtype=torch.float32)
    with torch.autocast(z_BLP.device.type, enabled=False):
        for cosine_BN in cosine_maps(z_BLP, features_BNP, schedule, scales):
            cosine = cosine + cosine_BN.mean()
    return -cosine
