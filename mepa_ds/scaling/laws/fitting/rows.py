"""The rows of a fit in one order whatever order they came in, and what the bootstrap draws from them.

Shapes: N rows, B draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mepa_ds.scaling.laws.fitting.checks import size_groups

Array = NDArray[np.float64]
_SMALLEST_STRATUM = 4


@dataclass(frozen=True)
class Rows:
    """Rows sorted by their inputs, then by loss.

    `order_N[i]` is where sorted row i stood. `stratum_N` numbers the groups of like size within which the bootstrap
    draws, and `cluster_N` the rows that it draws together.
    """

    columns: Mapping[str, Array]
    loss_N: Array
    order_N: NDArray[np.intp]
    stratum_N: NDArray[np.intp]
    cluster_N: NDArray[np.intp]

    @classmethod
    def of(cls, columns: Mapping[str, Array], loss_N: Array, cluster_N: NDArray[np.intp]) -> Rows:
        """Sorts rows. The first column is the size."""
        keys = [loss_N, *reversed(list(columns.values()))]
        order = np.lexsort(keys)
        ordered = {name: values[order] for name, values in columns.items()}
        seen: dict[int, int] = {}
        cluster = np.array([seen.setdefault(int(label), len(seen)) for label in cluster_N[order]], np.intp)
        strata = _strata(next(iter(ordered.values())), cluster)
        return cls(ordered, loss_N[order], order, strata, cluster)

    @property
    def log_loss_N(self) -> Array:
        return np.log(self.loss_N)

    @property
    def num_clusters(self) -> int:
        return int(self.cluster_N.max()) + 1

    def unsorted(self, values_N: Array) -> tuple[float, ...]:
        """Values of the sorted rows, in the order in which the rows came."""
        result = np.empty_like(values_N)
        result[self.order_N] = values_N
        return tuple(result.tolist())

    def inflation(self) -> float:
        """By how much the spread of means of m clusters, drawn from themselves, falls short: sqrt(m / (m - 1))."""
        counts = [len(np.unique(self.cluster_N[self.stratum_N == s])) for s in np.unique(self.stratum_N)]
        inverse = sum(count - 1 for count in counts) / self.num_clusters
        return float(1 / np.sqrt(max(inverse, 0.5)))

    def draw_weights(self, draws: int, seed: int) -> Array:
        """How often each row is drawn, (B, N): whole clusters with replacement, within strata."""
        rng = np.random.default_rng(seed)
        times = np.zeros((draws, self.num_clusters))
        for stratum in np.unique(self.stratum_N):
            members = np.unique(self.cluster_N[self.stratum_N == stratum])
            times[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=draws)
        return times[:, self.cluster_N]


def _strata(size_N: Array, cluster_N: NDArray[np.intp]) -> NDArray[np.intp]:
    """Groups of like size. Neighbours are joined until each holds four clusters: fewer have no spread to draw."""
    # A cluster belongs to the stratum of its first row.
    first_of = {int(label): index for index, label in reversed(list(enumerate(cluster_N)))}
    groups_N = size_groups(size_N)[[first_of[int(label)] for label in cluster_N]]
    joined: list[list[int]] = []
    for group in np.unique(groups_N):
        if joined and len(_members(cluster_N, groups_N, joined[-1])) < _SMALLEST_STRATUM:
            joined[-1].append(int(group))
        else:
            joined.append([int(group)])
    if len(joined) > 1 and len(_members(cluster_N, groups_N, joined[-1])) < _SMALLEST_STRATUM:
        joined[-2:] = [joined[-2] + joined[-1]]
    stratum_of = {group: number for number, groups in enumerate(joined) for group in groups}
    return np.array([stratum_of[int(group)] for group in groups_N], np.intp)


def _members(cluster_N: NDArray[np.intp], groups_N: NDArray[np.intp], groups: list[int]) -> NDArray[np.intp]:
    return np.unique(cluster_N[np.isin(groups_N, groups)])
