"""The seconds of a step, by part."""

from __future__ import annotations

from dataclasses import dataclass

from mepa_ds.planning.cluster.links import Group, Links
from mepa_ds.planning.cluster.machines import Assumptions, Cluster
from mepa_ds.planning.cluster.work import RankWork

_BACKWARD = 2 / 3  # of the time of both passes


@dataclass(frozen=True)
class Layout:
    """How a global batch is spread over ranks."""

    world_size: int
    ep_size: int
    micro_batch: int
    """Images of one rank and pass."""
    accumulation: int
    overlap: bool
    """Gradients are reduced beside the backward pass (overlap_comm of DeepSpeed's knobs)."""

    @property
    def global_batch(self) -> int:
        return self.world_size * self.micro_batch * self.accumulation


PARTS = (
    "matrix products",
    "other operators",
    "launches",
    "imbalance",
    "all-to-all",
    "gradients",
    "optimizer",
    "weights",
    "data",
)
"""`launches`: what a device waits for its host; `imbalance`: the slowest rank's experts; then what no computation hides
of tokens' all-to-alls and of the reduction of gradients; the update; the gathering of the new weights; the wait for
data."""


def step_seconds(work: RankWork, layout: Layout, cluster: Cluster, assumed: Assumptions) -> dict[str, float]:
    """Returns the seconds of each part; they add up to the step."""
    links, passes = Links(cluster, assumed), layout.accumulation
    memory = cluster.memory_bandwidth * assumed.memory_share
    seconds = dict.fromkeys(PARTS, 0.0) | _computation(work, cluster, assumed)
    computed = sum(seconds.values())
    if layout.ep_size > 1:
        grown = seconds_of_experts(work, cluster, assumed) * (assumed.imbalance - 1)
        seconds["imbalance"] = grown
        seconds["all-to-all"] = _exposed_exchanges(work, layout, cluster, assumed)
    reduction = _reduction(work, layout, cluster, links)
    hidden = min(reduction, computed * _BACKWARD) * assumed.hidden_share if layout.overlap else 0.0
    reductions = passes if work.reduced_every_pass else 1
    seconds = {part: passes * value for part, value in seconds.items()}
    seconds["gradients"] = reductions * (reduction - hidden)
    seconds["optimizer"] = work.optimizer_traffic / memory
    seconds["weights"] = sum(
        links.all_gather(size, group, work.bucket_bytes) for size, group in _gradient_groups(work, layout, cluster)
    )
    nodes = -(-layout.world_size // cluster.ranks_per_node)
    reading = layout.global_batch * work.sample_bytes / min(cluster.storage_total, nodes * cluster.storage_bandwidth)
    seconds["data"] = max(0.0, reading - sum(seconds.values()))  # batches are read ahead
    return seconds


def seconds_of_experts(work: RankWork, cluster: Cluster, assumed: Assumptions) -> float:
    """Returns the seconds of a micro-batch's rows in their experts, at even loads."""
    return work.expert_flops / (cluster.peak_flops * assumed.expert_share)


def _computation(work: RankWork, cluster: Cluster, assumed: Assumptions) -> dict[str, float]:
    """Seconds of one micro-batch, both passes, by part."""
    dense = (work.operators.matrix_flops - work.expert_flops) / (cluster.peak_flops * assumed.matrix_share)
    traffic = assumed.traffic_share * work.operators.other_bytes + work.gradient_traffic
    seconds = {
        "matrix products": dense + seconds_of_experts(work, cluster, assumed),
        "other operators": traffic / (cluster.memory_bandwidth * assumed.memory_share),
    }
    launches = work.operators.count * assumed.launch_us * 1e-6
    done = sum(seconds.values()) if assumed.launches_ahead else 0.0
    return seconds | {"launches": max(0.0, launches - done)}


def _exposed_exchanges(work: RankWork, layout: Layout, cluster: Cluster, assumed: Assumptions) -> float:
    """Seconds of a micro-batch's all-to-alls that the shared experts do not hide.

    Half of a layer's shared expert runs beside each of the two exchanges of a pass; the backward pass has twice the
    work.
    """
    group = Group.strided(layout.ep_size, 1, cluster.ranks_per_node)
    one = Links(cluster, assumed).all_to_all(work.exchanged_bytes * assumed.imbalance, group)
    layers = max(work.backward_exchanges // 2, 1)
    beside = work.shared_flops / layers / (cluster.peak_flops * assumed.matrix_share)
    total = 0.0
    for number, share in ((work.forward_exchanges, 1 / 6), (work.backward_exchanges, 1 / 3)):
        total += number * (one - min(one, beside * share) * assumed.hidden_share)
    # Before the rows their numbers travel, and the host reads them.
    counts = work.forward_exchanges / 2 * 2 * assumed.latency_us * 1e-6
    return total + counts


def _gradient_groups(work: RankWork, layout: Layout, cluster: Cluster) -> list[tuple[float, Group]]:
    """Bytes, and the ranks that hold the same: all of them, or those with the same experts."""
    n, ep_size = layout.world_size, layout.ep_size
    everyone = Group.strided(n, 1, cluster.ranks_per_node)
    if ep_size == 1:
        return [(work.expert_bytes + work.other_bytes, everyone)]
    holders = Group.strided(n // ep_size, ep_size, cluster.ranks_per_node)
    return [(work.other_bytes, everyone), (work.expert_bytes, holders)]


def _reduction(work: RankWork, layout: Layout, cluster: Cluster, links: Links) -> float:
    """Seconds in which the gradients of all parameters are summed: DeepSpeed reduces each bucket on all its ranks."""
    return sum(
        links.all_reduce(size, group, work.bucket_bytes) for size, group in _gradient_groups(work, layout, cluster)
    )
