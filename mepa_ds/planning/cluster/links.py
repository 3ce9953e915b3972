"""Time of collectives by the bytes that cross each link.

Ranks are numbered node by node. A group has `size` ranks, of which `together` share a node.

    all-reduce, in rings     each rank sends 2 (n - 1) / n of the tensor
    all-gather, in rings     each rank sends (n - 1) / n
    all-to-all               each rank sends 1 / n to each other one

A ring passes through all members of a node before it leaves, so that a group with m members in a node has m ports for
its rings: m times the network's bandwidth, at most that of the node's own links.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mepa_ds.planning.cluster.machines import Assumptions, Cluster


@dataclass(frozen=True)
class Group:
    """Ranks of a collective. `together` of them share a node (all of them: the group is within one node)."""

    size: int
    together: int

    @classmethod
    def strided(cls, size: int, stride: int, ranks_per_node: int) -> Group:
        """Returns the group of ranks i, i + stride, i + 2 stride, ...; stride 1: ranks in a row."""
        return cls(size, min(size, max(ranks_per_node // stride, 1)))


class Links:
    """The links of a cluster, as fast as collectives use them."""

    def __init__(self, cluster: Cluster, assumed: Assumptions):
        self._node = cluster.node_bandwidth * assumed.link_share
        self._network = cluster.network_bandwidth * assumed.link_share
        self._latency = assumed.latency_us * 1e-6

    def all_reduce(self, size: float, group: Group, bucket: float) -> float:
        """Seconds for `size` bytes of each rank, in messages of `bucket` bytes."""
        return 2 * self._ring(size, group, bucket)

    def all_gather(self, size: float, group: Group, bucket: float) -> float:
        """Seconds until each rank has all of `size` bytes, of which it had its share."""
        return self._ring(size, group, bucket)

    def all_to_all(self, size: float, group: Group) -> float:
        """Seconds for `size` bytes of each rank, as much for every member. Both kinds of links work side by side."""
        if group.size == 1:
            return 0.0
        near = size * (group.together - 1) / group.size / self._node
        far = size * (group.size - group.together) / group.size / self._network
        return max(near, far) + self._hops(group)

    def _ring(self, size: float, group: Group, bucket: float) -> float:
        n, m = group.size, group.together
        if n == 1 or size == 0:
            return 0.0
        inside = self._node if m > 1 else math.inf
        bandwidth = inside if m == n else min(inside, m * self._network)
        return size * (n - 1) / n / bandwidth + math.ceil(size / bucket) * self._hops(group)

    def _hops(self, group: Group) -> float:
        return self._latency * math.ceil(math.log2(group.size))
