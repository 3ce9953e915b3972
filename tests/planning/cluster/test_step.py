"""Times of collectives and of steps against numbers worked out by hand, and what must hold for all numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mepa_ds.planning.cluster.links import Group, Links
from mepa_ds.planning.cluster.machines import Assumptions, Cluster
from mepa_ds.planning.cluster.operators import Operators
from mepa_ds.planning.cluster.step import PARTS, Layout, step_seconds
from mepa_ds.planning.cluster.work import RankWork

CLUSTER = Cluster(
    ranks_per_node=8,
    device_memory=80e9,
    peak_flops=1e15,
    memory_bandwidth=2e12,
    node_bandwidth=400e9,
    network_bandwidth=50e9,
    storage_bandwidth=4e9,
    storage_total=20e9,
)
PLAIN = Assumptions(
    matrix_share=0.5, expert_share=0.25, memory_share=1, link_share=1, hidden_share=1, imbalance=1, launch_us=0,
    latency_us=0,
)  # fmt: skip
WORK = RankWork(
    operators=Operators(matrix_flops=10e12, other_bytes=20e9, count=4000),
    expert_flops=4e12,
    shared_flops=2e12,
    forward_exchanges=8,
    backward_exchanges=8,
    exchanged_bytes=4e9,
    expert_bytes=8e9,
    other_bytes=4e9,
    bucket_bytes=1e9,
    reduced_every_pass=True,
    gradient_traffic=2e9,
    optimizer_traffic=6e9,
    sample_bytes=200e3,
)


@pytest.mark.parametrize(
    ("group", "seconds"),
    [
        (Group(1, 1), 0.0),
        (Group(8, 8), 2 * 7 / 8 * 8e9 / 400e9),  # within a node
        (Group(16, 8), 2 * 15 / 16 * 8e9 / 400e9),  # 8 ports of 50 GB/s are as fast as the node's links
        (Group(8, 1), 2 * 7 / 8 * 8e9 / 50e9),  # one rank a node has one port
        (Group(16, 2), 2 * 15 / 16 * 8e9 / 100e9),
    ],
)
def test_all_reduce_by_hand(group: Group, seconds: float) -> None:
    links = Links(CLUSTER, PLAIN)
    assert links.all_reduce(8e9, group, 1e9) == pytest.approx(seconds)
    assert links.all_gather(8e9, group, 1e9) == pytest.approx(seconds / 2)


@pytest.mark.parametrize(
    ("group", "seconds"),
    [
        (Group(1, 1), 0.0),
        (Group(4, 4), 3 / 4 * 8e9 / 400e9),
        (Group(8, 8), 7 / 8 * 8e9 / 400e9),
        (Group(16, 8), 8 / 16 * 8e9 / 50e9),  # half of the rows leave the node, by each rank's own port
    ],
)
def test_all_to_all_by_hand(group: Group, seconds: float) -> None:
    assert Links(CLUSTER, PLAIN).all_to_all(8e9, group) == pytest.approx(seconds)


def test_latencies_of_messages() -> None:
    links = Links(replace(CLUSTER, node_bandwidth=math.inf), replace(PLAIN, latency_us=10))
    assert links.all_to_all(1.0, Group(8, 8)) == pytest.approx(3 * 10e-6)
    assert links.all_gather(2.5e9, Group(8, 8), 1e9) == pytest.approx(3 * 3 * 10e-6), "three buckets"


def test_groups_of_ranks() -> None:
    assert Group.strided(8, 1, 8) == Group(8, 8)
    assert Group.strided(64, 1, 8) == Group(64, 8)
    assert Group.strided(8, 8, 8) == Group(8, 1), "the ranks with the same experts, one a node"
    assert Group.strided(32, 2, 8) == Group(32, 4)
    assert Group.strided(4, 16, 8) == Group(4, 1), "a group of experts over two nodes"


def test_a_step_by_hand() -> None:
    """64 ranks, ep_size 8: tokens stay in the node, experts' gradients cross the network by one port a rank."""
    seconds = step_seconds(WORK, Layout(64, 8, 10, 2, overlap=False), CLUSTER, PLAIN)
    assert set(seconds) == set(PARTS)
    assert seconds["matrix products"] == pytest.approx(2 * (6e12 / 0.5e15 + 4e12 / 0.25e15))
    assert seconds["other operators"] == pytest.approx(2 * 22e9 / 2e12)
    assert seconds["launches"] == seconds["imbalance"] == 0
    one = 7 / 8 * 4e9 / 400e9
    beside = 2e12 / 4 / 0.5e15  # a layer's shared expert, both passes: 1/6 runs beside an exchange forward, 1/3 back
    assert seconds["all-to-all"] == pytest.approx(2 * (8 * (one - beside / 6) + 8 * (one - beside / 3)))
    others, experts = 63 / 64 * 4e9 / 400e9, 7 / 8 * 8e9 / 50e9
    assert seconds["gradients"] == pytest.approx(2 * 2 * (others + experts))
    assert seconds["weights"] == pytest.approx(others + experts)
    assert seconds["optimizer"] == pytest.approx(6e9 / 2e12)
    reading = 64 * 10 * 2 * 200e3 / 20e9
    assert seconds["data"] == pytest.approx(max(0.0, reading - sum(seconds.values()) + seconds["data"]))


def test_slow_storage_is_waited_for() -> None:
    slow = replace(CLUSTER, storage_total=1e8)
    seconds = step_seconds(WORK, Layout(64, 8, 10, 2, overlap=False), slow, PLAIN)
    assert sum(seconds.values()) == pytest.approx(64 * 10 * 2 * 200e3 / 1e8)


def test_an_overlapped_reduction_hides_behind_the_backward_pass() -> None:
    alone, beside = (step_seconds(WORK, Layout(64, 8, 10, 1, overlap), CLUSTER, PLAIN) for overlap in (False, True))
    computed = alone["matrix products"] + alone["other operators"]
    assert beside["gradients"] == pytest.approx(alone["gradients"] - computed * 2 / 3)
    assert all(beside[part] == alone[part] for part in PARTS if part not in ("gradients", "data"))


def test_zero_1_reduces_once_a_step() -> None:
    layout = Layout(64, 1, 10, 4, overlap=False)
    often, once = (
        step_seconds(replace(WORK, reduced_every_pass=every), layout, CLUSTER, PLAIN)["gradients"]
        for every in (True, False)
    )
    assert often == pytest.approx(4 * once)


def test_launches_bound_small_micro_batches() -> None:
    small = replace(WORK, operators=Operators(1e9, 1e6, 4000), expert_flops=0.0, gradient_traffic=0.0)
    layout = Layout(8, 1, 1, 1, overlap=False)
    seconds = step_seconds(small, layout, CLUSTER, replace(PLAIN, launch_us=5))
    assert seconds["launches"] + seconds["matrix products"] + seconds["other operators"] == pytest.approx(0.02)
    on_a_cpu = step_seconds(small, layout, CLUSTER, replace(PLAIN, launch_us=5, launches_ahead=False))
    assert on_a_cpu["launches"] == pytest.approx(0.02)


RATES = ("peak_flops", "memory_bandwidth", "node_bandwidth", "network_bandwidth", "storage_bandwidth", "storage_total")


@settings(max_examples=60, deadline=None)
@given(
    rate=st.sampled_from(RATES),
    factor=st.floats(1, 100),
    nodes=st.integers(1, 64),
    ep_size=st.sampled_from([1, 2, 4, 8, 16]),
    accumulation=st.integers(1, 4),
    overlap=st.booleans(),
    hidden_share=st.floats(0, 1),
)
def test_a_slower_cluster_is_never_faster(
    rate: str, factor: float, nodes: int, ep_size: int, accumulation: int, overlap: bool, hidden_share: float
) -> None:
    """With partly hidden transfers too; and no part of a step is ever negative."""
    assumed = replace(PLAIN, hidden_share=hidden_share, imbalance=1.2, launch_us=5, latency_us=10)
    layout = Layout(16 * nodes, ep_size, 4, accumulation, overlap)
    fast = step_seconds(WORK, layout, CLUSTER, assumed)
    slow = step_seconds(WORK, layout, replace(CLUSTER, **{rate: getattr(CLUSTER, rate) / factor}), assumed)
    assert min(*fast.values(), *slow.values()) >= 0
    if rate in ("peak_flops", "memory_bandwidth"):  # longer computation may hide more, but never more than it grows
        assert sum(slow.values()) >= sum(fast.values()) * (1 - 1e-9)
    else:
        assert all(slow[part] >= fast[part] * (1 - 1e-9) for part in PARTS if part != "data")
        assert sum(slow.values()) >= sum(fast.values()) * (1 - 1e-9)
