"""What one rank does in a step of a run, in operations and bytes: the same on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.shards.index import INDEX_NAME, ShardIndex
from mepa_ds.engine import deepspeed_config
from mepa_ds.engine.gradients import gathers_directly
from mepa_ds.errors import UserError
from mepa_ds.models.summary import count_parameters
from mepa_ds.objective import flops
from mepa_ds.planning.cluster.operators import OperatorCount, Operators
from mepa_ds.planning.frozen_networks import FrozenNetworks
from mepa_ds.planning.memory_trace import Traced
from mepa_ds.planning.plan import Machine, MicroBatch, measure_micro_batch
from mepa_ds.progress import Progress

# Accesses to memory for each element that a rank updates, in bytes. Fused AdamW reads gradient, master and both moments
# and writes the last three (28); before and after it ZeRO widens the gradient, takes its norm and rounds the master.
_OPTIMIZER_BYTES = 28 + 16
# Times that a micro-batch's gradient is read or written on its way into a bucket, out of it and into the sum; one rank
# alone puts it into the sum at once.
_GRADIENT_ACCESSES, _ALONE = 4, 2
_TAR_BYTES = 1536
"""Headers, padding and label of a sample in a tar."""


@dataclass(frozen=True)
class RankWork:
    """Of one rank. Bytes of collectives are whole tensors; what crosses a link follows from the group."""

    operators: Operators
    """Of one micro-batch, both passes."""
    expert_flops: float
    """The part of them that routed experts do."""
    shared_flops: float
    """The part that shared experts do."""
    forward_exchanges: int
    """All-to-alls of rows in a micro-batch's forward pass, and where that is computed again."""
    backward_exchanges: int
    """All-to-alls of their gradients."""
    exchanged_bytes: float
    """Rows of one of them."""
    expert_bytes: float
    """Gradients of the experts that a rank holds."""
    other_bytes: float
    """Gradients of all else."""
    bucket_bytes: float
    reduced_every_pass: bool
    """ZeRO-2 reduces gradients in every micro-batch, ZeRO-1 once a step."""
    gradient_traffic: float
    """Memory accesses for a micro-batch's gradients, in bytes."""
    optimizer_traffic: float
    """Memory accesses of an update, in bytes."""
    sample_bytes: float
    """What an image takes in the shards."""


class Workload:
    """The work of a recipe at any layout. Micro-batches of two sizes are run with fake tensors for ep_size 1 and for a
    larger one; other sizes lie on the line through both. Ranks of other ep_sizes differ in the experts that they hold.

    Raises UserError for a run that makes its tokens online: decoding images is not modelled.
    """

    def __init__(self, config: PretrainConfig, ep_sizes: Sequence[int], images: tuple[int, int], is_gpu: bool = True):
        if config.data.tokens is None:
            raise UserError(
                "data.images: the simulation knows precomputed sets; give data.tokens (and data.features), whether "
                "they are there yet or not"
            )
        self.config, self.is_gpu = config, is_gpu
        self._images = images
        self._machine = Machine(1, is_gpu, None, 0.0)
        traced_sizes = sorted({min(ep_sizes), max(ep_sizes)})
        tasks = [(ep_size, size) for ep_size in traced_sizes for size in sorted(set(images))]
        progress = Progress(tasks, "running micro-batches without numbers", delay=5, leave=False)
        self._measured = {task: self._measure(*task) for task in progress}
        self._traced_ep = max(ep_sizes)
        projector = self.micro_batch(max(ep_sizes), images[0])[0].traced.num_elements["projector"]
        elements = count_parameters(config.model).total + projector
        self.checkpoint_bytes = float(4 * elements * (4 if config.optim.ema else 3))
        self.sample_bytes, self.assumed = _sample_bytes(config, next(iter(self._measured.values()))[0].networks)

    def _measure(self, ep_size: int, images: int) -> tuple[MicroBatch, Operators]:
        count = OperatorCount()
        measured = measure_micro_batch(self.with_layout(ep_size, 1, 1), self._machine, images, count)
        return measured, count.operators

    def with_layout(self, ep_size: int, accumulation: int, global_batch: int | None = None) -> PretrainConfig:
        """Returns the recipe with another layout."""
        train = {"accumulation": accumulation} | ({} if global_batch is None else {"global_batch": global_batch})
        return self.config.model_copy(
            update={
                "parallel": self.config.parallel.model_copy(update={"ep_size": ep_size}),
                "train": self.config.train.model_copy(update=train),
            }
        )

    def micro_batch(self, ep_size: int, images: int) -> tuple[MicroBatch, Operators]:
        """Returns memory and operators of a micro-batch of so many images on a rank."""
        traced_ep = ep_size if (ep_size, self._images[0]) in self._measured else self._traced_ep
        (low, few), (high, many) = (self._measured[traced_ep, size] for size in self._images)
        first, second = self._images
        share = (images - first) / (second - first) if second > first else 0.0
        elements = dict(low.traced.num_elements)
        elements["routed experts"] = elements["routed experts"] * traced_ep // ep_size
        sizes = {
            name: max(0, round(getattr(low.traced, name) * (1 - share) + getattr(high.traced, name) * share))
            for name in ("kept", "intermediate", "exchanged")
        }
        traced = Traced(num_elements=elements, **sizes)
        return MicroBatch(traced, low.networks), few.between(many, share)

    def of_rank(self, ep_size: int, images: int, world_size: int) -> RankWork:
        """Returns the work of one of `world_size` ranks with micro-batches of so many images."""
        config, model = self.config, self.config.model
        measured, operators = self.micro_batch(ep_size, images)
        held = measured.traced.num_elements
        low = 4 if config.parallel.precision == "fp32" else 2
        others = held["transformer"] + held["projector"]
        partition = held["routed experts"] * ep_size / world_size + others / world_size
        moe, layers = model.moe, sum(model.is_moe_block(index) for index in range(model.depth))
        again = config.parallel.activation_checkpointing != "none"
        experts = images * flops.image_flops(model)["experts"]
        knobs = deepspeed_config.read_knobs(config.parallel.deepspeed)
        zero = knobs["zero_optimization"]
        accesses = _ALONE if gathers_directly(knobs, world_size) else _GRADIENT_ACCESSES
        work = RankWork(
            operators=operators,
            expert_flops=0.0,
            shared_flops=0.0,
            forward_exchanges=0,
            backward_exchanges=0,
            exchanged_bytes=0.0,
            expert_bytes=float(low * held["routed experts"]),
            other_bytes=float(low * others),
            bucket_bytes=float(low * int(zero.get("reduce_bucket_size", 5e8))),
            reduced_every_pass=zero["stage"] == 2,
            gradient_traffic=float(accesses * low * (held["routed experts"] + others)),
            optimizer_traffic=_OPTIMIZER_BYTES * partition,
            sample_bytes=self.sample_bytes,
        )
        if moe is None:
            return work
        routed = moe.top_k / (moe.top_k + int(moe.shared_expert))
        rows = images * model.schedule.num_tokens * moe.top_k
        return replace(
            work,
            expert_flops=routed * experts,
            shared_flops=(1 - routed) * experts,
            forward_exchanges=0 if ep_size == 1 else (4 if again else 2) * layers,
            backward_exchanges=0 if ep_size == 1 else 2 * layers,
            exchanged_bytes=float(rows * model.C * low),
        )


def _sample_bytes(config: PretrainConfig, networks: FrozenNetworks) -> tuple[float, list[str]]:
    """Bytes of an image in the sets, and what had to be assumed."""
    total, assumed = 0.0, list(networks.assumed)
    sets = {"data.tokens": config.data.tokens, "data.features": config.data.features}
    guesses = {
        "data.tokens": 2.0 * config.model.schedule.num_tokens + _TAR_BYTES,
        "data.features": float((networks.teacher_width or 0) + 2) * networks.teacher_patches + _TAR_BYTES,
    }
    for key, directory in sets.items():
        if directory is None or (key == "data.features" and networks.teacher_width is None):
            continue
        if (directory / INDEX_NAME).exists():
            index = ShardIndex.read(directory, key)
            total += sum(shard.bytes for shard in index.shards) / index.num_samples
        else:
            total += guesses[key]
            codec = "" if key == "data.tokens" else " as int8"
            assumed.append(f"{key}: {guesses[key]:.0f} bytes an image{codec} (no {directory} to read it from)")
    return total, assumed
