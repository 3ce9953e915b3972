"""Embeddings of positions and scales for another schedule.

Shapes: S scales, L tokens over all scales, C width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mepa_ds.scales import ScaleSchedule

POSITIONS, SCALES, START = "position_embed", "scale_embed.weight", "start_embed"
_ROUTER = ".scale_logits_SE"


def resampled(state: Mapping[str, Tensor], theirs: ScaleSchedule, ours: ScaleSchedule) -> dict[str, Tensor]:
    """The weights of `state` that depend on the schedule, for another schedule; fp32.

    As many scales take each other's places, such as VAR's ten of 512 px those of 256 px. Otherwise a scale's place
    between coarse and fine is log(side) / log(finest side), over which the sides of VAR's schedules are spread about
    evenly, and a scale whose place lies between two of theirs gets a mixture of the two, by distance. Maps of positions
    are resized to its side first (bicubic).
    """
    found = {START: _resized(state[START], theirs.sides[0], ours.sides[0])}
    maps = [state[POSITIONS][:, start:end] for start, end in theirs.bounds]
    positions = []
    weights_TS = _mixture(theirs, ours)
    for side, weights_S in zip(ours.sides, weights_TS, strict=True):
        parts = [
            weight * _resized(maps[scale], theirs.sides[scale], side)
            for scale, weight in enumerate(weights_S.tolist())
            if weight
        ]
        positions.append(torch.stack(parts).sum(0))
    found[POSITIONS] = torch.cat(positions, dim=1)
    for name, tensor in state.items():
        if name == SCALES or name.endswith(_ROUTER):
            found[name] = weights_TS @ tensor.float()
    return found


def _mixture(theirs: ScaleSchedule, ours: ScaleSchedule) -> Tensor:
    """(our scales, their scales): how much of each of theirs one of ours is made of."""
    if theirs.num_scales == ours.num_scales:
        return torch.eye(ours.num_scales)
    places, weights_TS = _places(theirs), torch.zeros(ours.num_scales, theirs.num_scales)
    for scale, place in enumerate(_places(ours)):
        after = next((index for index, other in enumerate(places) if other >= place), len(places) - 1)
        before = max(after - 1, 0) if places[after] > place else after
        share = 1.0 if before == after else (place - places[before]) / (places[after] - places[before])
        weights_TS[scale, before] += 1 - share
        weights_TS[scale, after] += share
    return weights_TS


def _places(schedule: ScaleSchedule) -> list[float]:
    finest = math.log(schedule.sides[-1])
    return [math.log(side) / finest if finest else 0.0 for side in schedule.sides]


def _resized(map_1lC: Tensor, side: int, new_side: int) -> Tensor:
    map_1lC = map_1lC.float()
    if side == new_side:
        return map_1lC
    map_1Css = map_1lC.transpose(1, 2).unflatten(2, (side, side))
    resized = F.interpolate(map_1Css, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2)
