"""The best layout of a recipe for each number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mepa_ds.objective import flops
from mepa_ds.planning.cluster.machines import Assumptions, Cluster
from mepa_ds.planning.cluster.step import Layout, step_seconds
from mepa_ds.planning.cluster.work import Workload
from mepa_ds.planning.plan import Machine, Plan, plan_run


@dataclass(frozen=True)
class Simulated:
    """One layout at work."""

    layout: Layout
    seconds: dict[str, float]
    """Of a step, by part."""
    memory: float
    """Bytes of a rank's device at the peak."""
    mfu: float

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        return self.layout.global_batch / self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        facts = {"step_seconds": self.step_seconds, "images_per_second": self.images_per_second}
        return asdict(self.layout) | facts | {"mfu": self.mfu, "memory": self.memory, "seconds": self.seconds}


@dataclass(frozen=True)
class Found:
    """All layouts of one number of ranks that fit, the fastest first; without one, `reason` says why."""

    world_size: int
    layouts: list[Simulated] = field(default_factory=list)
    reason: str | None = None

    @property
    def best(self) -> Simulated | None:
        return self.layouts[0] if self.layouts else None


def ep_sizes(num_experts: int, world_sizes: Iterable[int]) -> list[int]:
    """Returns the sizes of expert-parallel groups that some number of ranks can have."""
    sizes = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
    return [size for size in sizes if any(world_size % size == 0 for world_size in world_sizes)]


def layouts(world_size: int, global_batch: int, sizes: Sequence[int]) -> list[Layout]:
    """Returns every way to spread the batch over the ranks; none if it does not divide."""
    share, rest = divmod(global_batch, world_size)
    if rest:
        return []
    return [
        Layout(world_size, ep_size, share // accumulation, accumulation, overlap)
        for ep_size in sizes
        if world_size % ep_size == 0
        for accumulation in range(1, share + 1)
        if share % accumulation == 0
        for overlap in (False, True)
    ]


def search(
    workload: Workload, world_sizes: Sequence[int], global_batch: int, cluster: Cluster, assumed: Assumptions
) -> list[Found]:
    """Simulates all layouts, and sorts those that fit by the seconds of a step."""
    moe = workload.config.model.moe
    sizes = ep_sizes(moe.num_experts if moe else 1, world_sizes)
    return [_search(workload, layouts(n, global_batch, sizes), n, global_batch, cluster, assumed) for n in world_sizes]


def _search(
    workload: Workload,
    choices: Sequence[Layout],
    world_size: int,
    global_batch: int,
    cluster: Cluster,
    assumed: Assumptions,
) -> Found:
    if not choices:
        nearest = max(round(global_batch / world_size), 1) * world_size
        return Found(
            world_size,
            reason=f"the global batch of {global_batch} does not divide by {world_size}; --global-batch {nearest} does",
        )
    fitting, least = list[Simulated](), float("inf")
    for layout in choices:
        plan = _plan(workload, layout)
        work = workload.of_rank(layout.ep_size, layout.micro_batch, world_size)
        memory = plan.peak
        least = min(least, memory)
        if cluster.device_memory is None or memory <= cluster.device_memory * assumed.usable_memory:
            seconds = step_seconds(work, layout, cluster, assumed)
            mfu = flops.mfu(plan.step_flops, sum(seconds.values()), cluster.peak_flops, world_size)
            fitting.append(Simulated(layout, seconds, memory, mfu))
    if not fitting:
        assert cluster.device_memory is not None
        again = workload.config.parallel.activation_checkpointing == "none"
        remedy = "parallel.activation_checkpointing=blocks" if again else "a smaller model or a smaller global batch"
        usable = cluster.device_memory * assumed.usable_memory
        line = f"does not fit: {least / 1e9:.1f} GB at least, {usable / 1e9:.1f} GB are usable; try {remedy}"
        return Found(world_size, reason=line)
    return Found(world_size, sorted(fitting, key=lambda simulated: simulated.step_seconds))


def _plan(workload: Workload, layout: Layout) -> Plan:
    measured, _ = workload.micro_batch(layout.ep_size, layout.micro_batch)
    config = workload.with_layout(layout.ep_size, layout.accumulation, layout.global_batch)
    machine = Machine(layout.world_size, workload.is_gpu, None, 0.0)
    return plan_run(config, machine, measured=measured, overlaps=layout.overlap)
