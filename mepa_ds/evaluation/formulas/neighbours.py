"""Which points lie in which balls, decided exactly but computed by fp32 products.

A distance by |x|^2 + |c|^2 - 2 x c is quick but rounded. What it cannot decide, because a distance and a radius differ
by less than its error, is decided by the differences of the coordinates in float64, as a plain double loop would.

Shapes: N points, M centres, D features, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mepa_ds.precision import full_fp32
from mepa_ds.progress import Progress

_PAIRS = 1 << 25  # distances at a time: 128 MB in fp32
_CANDIDATES = 6  # nearest ones beside the neighbour that is looked for, among which it is if their order is certain
_DIRECT = 1 << 24  # coordinates of differences at a time: 128 MB


class Points:
    """Rows (N, D): exact in float64 as they were given, and centred and scaled in fp32 or float64 for products."""

    def __init__(self, rows_ND: Tensor, centre_D: Tensor, scale: float, dtype: torch.dtype):
        self.rows_ND = rows_ND
        self._scale = scale
        self.quick_ND = torch.empty(rows_ND.shape, dtype=dtype, device=rows_ND.device)
        for first in range(0, len(rows_ND), 4096):
            part_ND = rows_ND[first : first + 4096].double()
            self.quick_ND[first : first + 4096] = (part_ND - centre_D).div_(scale)
        self.squares_N = self.quick_ND.double().square().sum(1) if dtype == torch.float64 else _squares(self.quick_ND)

    def __len__(self) -> int:
        return len(self.rows_ND)


def _squares(rows_ND: Tensor) -> Tensor:
    return torch.cat([part_ND.double().square().sum(1) for part_ND in rows_ND.split(4096)])


def prepare(reference_ND: Tensor, samples_MD: Tensor, dtype: torch.dtype) -> tuple[Points, Points]:
    """Both sets about one centre, in one scale: neither moves a distance but by the factor of the scale."""
    centre_D = reference_ND.mean(0, dtype=torch.float64)
    largest = max(float((part.double() - centre_D).abs().max()) for part in (reference_ND, samples_MD))
    # A power of two rounds nothing.
    scale = 2.0 ** math.ceil(math.log2(largest)) if largest > 0 and math.isfinite(largest) else 1.0
    return Points(reference_ND, centre_D, scale, dtype), Points(samples_MD, centre_D, scale, dtype)


class Distances:
    """Squared distances (rows of points, M) in the scale of the points, and how wrong they may be."""

    def __init__(self, points: Points, centres: Points):
        self.points, self.centres = points, centres
        dtype = centres.quick_ND.dtype
        width = centres.quick_ND.shape[1]
        # Rounding of the centred coordinates (2 eps of each square), and of the product: its error grows as the root
        # of the number of terms; 4 is a wide margin.
        self._unit = (4 + 4 * math.sqrt(width) / 8) * torch.finfo(dtype).eps
        self._squares_M = centres.squares_N.to(dtype)
        self._largest = float(centres.squares_N.max())

    def blocks(self) -> Iterator[tuple[range, Tensor, Tensor]]:
        """(numbers of points, distances (n, M), error (n, 1)) block by block."""
        rows = max(1, _PAIRS // len(self.centres))
        starts = range(0, len(self.points), rows)
        for first in Progress(starts, "distances", unit="block", delay=5, leave=False):
            part = range(first, min(first + rows, len(self.points)))
            quick_nD = self.points.quick_ND[part.start : part.stop]
            squares_n = self.points.squares_N[part.start : part.stop]
            with full_fp32():
                d_nM = torch.addmm(self._squares_M, quick_nD, self.centres.quick_ND.T, alpha=-2)
            d_nM += squares_n.to(d_nM.dtype)[:, None]
            yield part, d_nM, (self._unit * (squares_n + self._largest)).to(d_nM.dtype)[:, None]

    def exact(self, row_P: Tensor, column_P: Tensor) -> Tensor:
        """(P,) squared distances of pairs, from differences in float64, not scaled."""
        step = max(1, _DIRECT // self.points.rows_ND.shape[1])
        parts = []
        for rows, columns in zip(row_P.split(step), column_P.split(step), strict=True):
            difference_PD = self.points.rows_ND[rows].double() - self.centres.rows_ND[columns].double()
            parts.append(difference_PD.square_().sum(1))
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=row_P.device)

    def exact_row(self, row: int) -> Tensor:
        """(M,) exact distances of one point to all centres."""
        columns_M = torch.arange(len(self.centres), device=self.centres.rows_ND.device)
        return self.exact(torch.full_like(columns_M, row), columns_M)

    def unscaled(self, distances: Tensor) -> Tensor:
        return distances.double() * self.points._scale**2

    def scaled(self, distances: Tensor) -> Tensor:
        return distances / self.points._scale**2


def neighbour_distances(points: Points, ks: tuple[int, ...]) -> Tensor:
    """(N, len(ks)) exact squared distances of each row to its k-th neighbour among the others."""
    largest = max(ks)
    distances = Distances(points, points)
    count = min(largest + 1 + _CANDIDATES, len(points))
    found_NK = torch.empty(len(points), largest, dtype=torch.float64, device=points.rows_ND.device)
    for part, d_nM, error_n1 in distances.blocks():
        rows_n = torch.arange(part.start, part.stop, device=d_nM.device)
        d_nM[rows_n - part.start, rows_n] = -torch.inf  # itself: the first of all
        near_nC, column_nC = d_nM.topk(count, dim=1, largest=False, sorted=True)
        others_nC = column_nC[:, 1:]
        exact_nC = distances.exact(rows_n.repeat_interleave(count - 1), others_nC.flatten()).view(others_nC.shape)
        exact_nC = exact_nC.sort(dim=1).values
        found_NK[part.start : part.stop] = exact_nC[:, :largest]
        if count == len(points):
            continue
        # What is not among the candidates is farther than the last of them, but for the error.
        bound_n = distances.unscaled(near_nC[:, -1:] - error_n1)[:, 0]
        # Nothing is nearer than an equal point.
        unsure_n = (exact_nC[:, largest - 1] > bound_n) & (exact_nC[:, largest - 1] > 0)
        for row in rows_n[unsure_n].tolist():
            all_M = distances.exact_row(row)
            all_M[row] = torch.inf
            found_NK[row] = all_M.topk(largest, largest=False, sorted=True).values
    return found_NK[:, [k - 1 for k in ks]]


def in_balls(
    points: Points, centres: Points, radii_MR: Tensor, own_N: Tensor
) -> Iterator[tuple[range, list[Tensor], Tensor]]:
    """For blocks of points: which of them lie in the balls of which centres, and which centres in theirs.

    Points on a ball's surface lie in it.

    Args:
        radii_MR: squared radii of the centres' balls; for each column there is an (n, M) answer.
        own_N: squared radii of the points' balls.
    """
    distances = Distances(points, centres)
    for part, d_nM, error_n1 in distances.blocks():
        inside = [_within(distances, part, d_nM, error_n1, radii_M[None]) for radii_M in radii_MR.T]
        yield part, inside, _within(distances, part, d_nM, error_n1, own_N[part.start : part.stop, None])


def _within(distances: Distances, part: range, d_nM: Tensor, error_n1: Tensor, radii: Tensor) -> Tensor:
    """(n, M) whether distances are at most the squared radii, (1, M) or (n, 1), which are not scaled."""
    gap_nM = d_nM - distances.scaled(radii).to(d_nM.dtype)
    inside_nM = gap_nM <= 0
    # The radius, in fp32, is rounded too.
    unsure_nM = gap_nM.abs_() <= 2 * error_n1
    row_K = unsure_nM.any(1).nonzero()[:, 0]  # few: `nonzero` of all would take as long as the product
    of_K, column_P = unsure_nM[row_K].nonzero(as_tuple=True)
    row_P = row_K[of_K]
    radii_P = radii.expand(d_nM.shape)[row_P, column_P]
    inside_nM[row_P, column_P] = distances.exact(row_P + part.start, column_P) <= radii_P
    return inside_nM


def nearest_distances(points_ND: Tensor, centres_MD: Tensor) -> Tensor:
    """(N,) the distance, not squared, of each point to its nearest centre, float64."""
    points, centres = prepare(points_ND, centres_MD, torch.float32)
    distances = Distances(points, centres)
    parts = []
    for part, d_nM, _ in distances.blocks():
        near_nC = d_nM.topk(min(_CANDIDATES, len(centres)), dim=1, largest=False).indices
        rows_n = torch.arange(part.start, part.stop, device=d_nM.device)
        exact_nC = distances.exact(rows_n.repeat_interleave(near_nC.shape[1]), near_nC.flatten()).view(near_nC.shape)
        parts.append(exact_nC.amin(1).sqrt())
    return torch.cat(parts)
