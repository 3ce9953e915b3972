"""`pretrain.py RECIPE --dry-run`: what a run will need, computed without data, ranks or GPUs.

Sizes of activations come from running the model with fake tensors (`memory_trace`), everything else from counts of
parameters and from what DeepSpeed's ZeRO-1/2 keeps of them. Memory is what is allocated; a GPU's allocator keeps some
freed memory on top. On a CPU what the C library keeps is a part of its own, estimated from runs.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mepa_ds import distributed
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.shards.index import INDEX_NAME, ShardIndex
from mepa_ds.engine import deepspeed_config
from mepa_ds.engine.gradients import gathers_directly
from mepa_ds.errors import UserError
from mepa_ds.machine import resident_bytes
from mepa_ds.models.summary import ParameterCounts, count_parameters
from mepa_ds.objective import flops
from mepa_ds.planning.frozen_networks import FrozenNetworks, plan_networks
from mepa_ds.planning.memory_trace import Traced, trace_micro_batch
from mepa_ds.pretrain.branching import trunk_state
from mepa_ds.runtime.schedule import check_phases

_FP32 = 4
# As a share of what is allocated at the peak. Measured with 15 million parameters under glibc: 0.4 to 0.85.
_KEPT_BY_C_LIBRARY = 0.6
KEPT_NAME = "freed, but kept by the C library"
_EXCHANGED_NAME, _WORKING_NAME = "all-to-all buffers", "tokenizer or teacher at work"
# More ranks than that are planned as if they were on several nodes.
_GPUS_OF_A_NODE = 8
# Parts that grow with the images of a micro-batch.
_WITH_BATCH = ("activations", "intermediate results", _EXCHANGED_NAME, _WORKING_NAME)


@dataclass(frozen=True)
class Machine:
    """The ranks that a run is planned for. `memory` is bytes of a rank; None: unknown, so it is not compared."""

    world_size: int
    is_gpu: bool
    memory: float | None
    process: float
    """Python, libraries and their threads: host memory that every rank needs before it has a model."""


@dataclass
class Plan:
    """Bytes are of one rank, `exchanged` of one step. Memory parts add up to `peak`."""

    config: PretrainConfig
    machine: Machine
    counts: ParameterCounts
    held: dict[str, int]
    """Parameters on each rank, by kind."""
    micro_batch: int
    step_flops: float
    backward: dict[str, float]
    """Memory at the peak of the backward pass, by part."""
    optimizer: dict[str, float]
    """Memory at the peak of the optimizer step, by part."""
    encoding: dict[str, float]
    """Memory while a micro-batch of images is encoded (data.images), by part."""
    host: dict[str, float]
    """Host memory beside a GPU."""
    exchanged: dict[str, float]
    checkpoint: float
    num_steps: int | None
    num_samples: int | None
    branch_step: int | None
    """Steps of the checkpoint that the run branches from."""
    assumed: list[str] = field(default_factory=list)

    @property
    def peak(self) -> float:
        """Bytes that a rank needs on its device (on a CPU: all it needs)."""
        return max(sum(parts.values()) for parts in (self.backward, self.optimizer, self.encoding))

    @property
    def problems(self) -> list[str]:
        """What would not fit, with a remedy."""
        limit = self.machine.memory
        if limit is None or self.peak <= limit:
            return []
        line = f"a rank needs {self.peak / 1e9:.1f} GB, but has {limit / 1e9:.1f} GB"
        if self._least_cut() is None:
            return [
                f"{line}: smaller micro-batches would not help; use more ranks, a larger parallel.ep_size or less model"
            ]
        fits = self.fitting_accumulation
        remedies = [] if fits is None else [f"train.accumulation={fits}"]
        if self.config.parallel.activation_checkpointing == "none" and sum(self.encoding.values()) <= limit:
            remedies.append("parallel.activation_checkpointing=blocks")
        return [f"{line}: try {' or '.join(remedies) or 'more ranks'}"]

    @property
    def fitting_accumulation(self) -> int | None:
        """The smallest train.accumulation with which a rank has room, at the same batch; None: there is none."""
        cut = self._least_cut()
        factors = range(cut, self.micro_batch + 1) if cut is not None else ()
        factor = next((factor for factor in factors if self.micro_batch % factor == 0), None)
        return None if factor is None else self.config.train.accumulation * factor

    def _least_cut(self) -> int | None:
        """By what a micro-batch must be divided at least, so that it fits; None where that does not help."""
        limit = self.machine.memory
        if limit is None or self.peak <= limit:
            return 1
        per_batch = [sum(parts.get(name, 0.0) for name in _WITH_BATCH) for parts in (self.backward, self.encoding)]
        fixed = [sum(self.backward.values()) - per_batch[0], sum(self.encoding.values()) - per_batch[1]]
        if max(*fixed, sum(self.optimizer.values())) >= limit:
            return None
        return max(math.ceil(grows / (limit - stays)) for grows, stays in zip(per_batch, fixed, strict=True))


@dataclass(frozen=True)
class MicroBatch:
    """What a micro-batch of one rank needs, and the networks beside the model."""

    traced: Traced
    networks: FrozenNetworks


def measure_micro_batch(
    config: PretrainConfig, machine: Machine, images: int, observer: TorchDispatchMode | None = None
) -> MicroBatch:
    """Runs a micro-batch of so many images with fake tensors, which takes seconds for large models."""
    networks = plan_networks(config, images)
    engine = _EngineMemory(config, machine, deepspeed_config.read_knobs(config.parallel.deepspeed))
    traced = trace_micro_batch(
        config, images, networks.teacher_width, networks.teacher_patches, engine.on_gradient, observer
    )
    return MicroBatch(traced, networks)


def plan_run(
    config: PretrainConfig,
    machine: Machine,
    num_samples: int | None = None,
    measured: MicroBatch | None = None,
    overlaps: bool | None = None,
) -> Plan:
    """Makes the plan.

    Args:
        num_samples: images of an epoch; None: as many as data.tokens has, if that set is there.
        measured: what the micro-batch needs; None: it is run.
        overlaps: whether gradients are reduced beside the backward pass; None: as the engine knobs say.

    Raises UserError when the recipe cannot be spread over the ranks.
    """
    config.check_world(machine.world_size)
    knobs = deepspeed_config.read_knobs(config.parallel.deepspeed)
    samples = config.data.tokens or config.data.images
    if num_samples is None and samples is not None and (samples / INDEX_NAME).exists():
        num_samples = ShardIndex.read(samples).num_samples
    num_samples = config.data.unique_images or num_samples  # an epoch of a subset has that many
    micro_batch = config.train.global_batch // (machine.world_size * config.train.accumulation)
    measured = measured or measure_micro_batch(config, machine, micro_batch)
    traced, networks = measured.traced, measured.networks
    engine = _EngineMemory(config, machine, knobs, overlaps)
    held = traced.num_elements
    backward, optimizer, encoding, host = engine.parts(traced, networks)
    counts = count_parameters(config.model)
    all_elements = counts.total + held["projector"]
    known = config.train.steps is not None or config.train.samples is not None or num_samples is not None
    num_steps = config.train.num_steps(num_samples or 0) if known else None
    if num_steps is not None:
        check_phases(config.optim, num_steps)
    return Plan(
        config=config,
        machine=machine,
        counts=counts,
        held=held,
        micro_batch=micro_batch,
        step_flops=flops.step_flops(config, networks.teacher_width),
        backward=backward,
        optimizer=optimizer,
        encoding=encoding,
        host=host,
        exchanged=engine.exchanged(traced, micro_batch),
        checkpoint=all_elements * _FP32 * (4 if config.optim.ema else 3),
        num_steps=num_steps,
        num_samples=num_samples,
        branch_step=_branch_step(config),
        assumed=networks.assumed,
    )


def _branch_step(config: PretrainConfig) -> int | None:
    if config.branch_from is None or not config.branch_from.exists():
        return None
    try:
        return trunk_state(config.branch_from).step
    except UserError as error:
        raise UserError(f"branch_from: {error}") from error


class _EngineMemory:
    """Memory that ZeRO-1/2 keeps on each rank, at each moment of a step."""

    def __init__(self, config: PretrainConfig, machine: Machine, knobs: dict[str, Any], overlaps: bool | None = None):
        self._config, self._machine = config, machine
        zero = knobs["zero_optimization"]
        assert isinstance(zero, dict)
        self._stage = zero["stage"]
        self._directly = gathers_directly(knobs, machine.world_size)
        self._bucket = 0 if self._directly else int(zero.get("reduce_bucket_size", 5e8))
        # Two buckets take turns where the reduction overlaps the backward pass, as it does by default across nodes.
        if overlaps is None:
            overlaps = bool(zero.get("overlap_comm", machine.world_size > _GPUS_OF_A_NODE))
        self._buckets = 2 if overlaps else 1
        self._all_reduces = bool(zero.get("use_multi_rank_bucket_allreduce", True))
        self._low = _FP32 if config.parallel.precision == "fp32" else 2
        self._in_bucket = 0

    def on_gradient(self, elements: int) -> int:
        """Growth of the gradient buffers, in bytes. A GPU's bucket is allocated whole, so it does not grow."""
        before = self._in_bucket
        self._in_bucket = min(before + elements, self._bucket) if self._stage == 2 else before + elements
        return 0 if self._machine.is_gpu and self._stage == 2 else (self._in_bucket - before) * self._low

    def _partitions(self, held: dict[str, int]) -> tuple[float, float]:
        """Elements of this rank's optimizer partition: experts (shared by the ranks that hold them), all others."""
        world_size, ep_size = self._machine.world_size, self._config.parallel.ep_size
        return held["routed experts"] / (world_size / ep_size), (held["transformer"] + held["projector"]) / world_size

    def parts(self, traced: Traced, networks: FrozenNetworks) -> tuple[dict[str, float], ...]:
        """Memory by part at the peak of the backward pass, at that of the optimizer step, while images are encoded, and
        on the host of a GPU.
        """
        held = sum(traced.num_elements.values())
        experts, others = self._partitions(traced.num_elements)
        partition = experts + others
        # With ep_size 1 the experts' matrices are in one parameter group with all others.
        largest = partition if self._config.parallel.ep_size == 1 else max(experts, others)
        average = _FP32 * partition if self._config.optim.ema else 0.0
        state = networks.weights | {
            "weights": float(self._low * held),
            "masters and Adam moments": 3 * _FP32 * partition,
            "average of the weights": average,
        }
        host = {"process": self._machine.process, "copy for checkpoints": 3 * _FP32 * partition + average}
        if not self._machine.is_gpu:  # the host is the device
            state |= host
        waits = self._directly or self._config.train.accumulation > 1
        waiting = self._low * partition if waits else 0.0
        bucket = self._buckets * self._bucket * self._low if self._machine.is_gpu and self._stage == 2 else 0.0
        backward = state | {
            "gradients": waiting + bucket,
            "activations": float(traced.kept),
            "intermediate results": float(traced.intermediate),
            _EXCHANGED_NAME: float(traced.exchanged),
        }
        # A group's gradients become one flat tensor (where they are not from the start), and that an fp32 one. The
        # fused AdamW needs no memory of its own.
        in_fp32 = self._low == _FP32
        optimizer = state | {
            "gradients": self._low * partition + (0.0 if self._directly and in_fp32 else _FP32 * largest),
            "intermediate results": 0.0 if self._directly or in_fp32 else self._low * largest,
        }
        encoding = {}
        if networks.working is not None:
            gradients = waiting if self._directly else bucket
            encoding = state | {"gradients": gradients, _WORKING_NAME: networks.working}
        if not self._machine.is_gpu:
            for parts in (backward, optimizer, encoding):
                if parts:
                    parts[KEPT_NAME] = _KEPT_BY_C_LIBRARY * (sum(parts.values()) - self._machine.process)
        return backward, optimizer, encoding, host if self._machine.is_gpu else {}

    def exchanged(self, traced: Traced, micro_batch: int) -> dict[str, float]:
        """Bytes that each rank sends in a step, with ring algorithms.

        DeepSpeed's reduction of gradients is an all-reduce of each bucket, from which a rank takes what it owns. So it
        sends twice what a reduce-scatter would, unless a knob makes it a reduction to each owner.
        """
        config, world_size, ep_size = self._config, self._machine.world_size, self._config.parallel.ep_size
        copies = world_size // ep_size
        experts = traced.num_elements["routed experts"]
        others = sum(traced.num_elements.values()) - experts
        shared = self._low * (experts * (copies - 1) / copies + others * (world_size - 1) / world_size)
        times = (config.train.accumulation if self._stage == 2 else 1) * (2 if self._all_reduces else 1)
        sent = {"gradients, reduced": shared * times, "weights, gathered": shared}
        if config.model.moe is not None and ep_size > 1:
            rows = micro_batch * config.model.schedule.num_tokens * config.model.moe.top_k
            layers = sum(config.model.is_moe_block(index) for index in range(config.model.depth))
            one_way = rows * config.model.C * self._low * (ep_size - 1) / ep_size
            again = config.parallel.activation_checkpointing != "none"
            passes = "2 forward, 2 again, 2 backward" if again else "2 forward, 2 backward"
            sent[f"tokens, all-to-all ({passes})"] = (6 if again else 4) * layers * one_way * config.train.accumulation
        return sent


def this_machine(config: PretrainConfig, world_size: int, memory: float | None) -> Machine:
    """Plans for a GPU if there is one or the precision is a GPU's, else for CPU ranks on this machine."""
    is_gpu = distributed.uses_gpu() or config.parallel.precision != "fp32"
    if memory is None and distributed.uses_gpu():
        memory = torch.cuda.get_device_properties(0).total_memory
    elif memory is None and not is_gpu:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / world_size
    # A rank has these in memory too; the first is imported for the first checkpoint.
    import mepa_ds.checkpoint.store
    import mepa_ds.pretrain.run  # noqa: F401

    return Machine(world_size, is_gpu, memory, float(resident_bytes()))


def format_plan(plan: Plan) -> str:
    """The plan as a person reads it."""
    config, machine, counts = plan.config, plan.machine, plan.counts
    on = "a GPU" if machine.is_gpu else "a CPU"
    lines = [
        f"plan: {machine.world_size} ranks, each with {on}, ep_size {config.parallel.ep_size}, "
        f"{config.parallel.precision}, {plan.micro_batch} images a rank and pass, {config.train.accumulation} a step",
        f"parameters: {counts}; on a rank " + ", ".join(f"{n / 1e6:.1f}M {kind}" for kind, n in plan.held.items() if n),
        f"length: {_length(plan)}",
        f"FLOPs: {plan.step_flops / 1e12:.3g} TFLOP a step, {plan.step_flops / machine.world_size / 1e12:.3g} a rank",
        *_table("memory of a rank at the peak of the backward pass", plan.backward),
        *_table("memory of a rank at the peak of the optimizer step", plan.optimizer),
    ]
    if plan.encoding:
        lines += _table("memory of a rank while images are encoded", plan.encoding)
    if plan.host:
        lines += _table("host memory beside a GPU", plan.host)
    lines += _table("sent by a rank in a step", plan.exchanged)
    lines.append(f"checkpoint: {_size(plan.checkpoint)}")
    lines += [f"assumed: {line}" for line in plan.assumed]
    if machine.memory is None:
        lines.append("fits: unknown; give --memory, the GB of one GPU")
    elif not plan.problems:
        lines.append(f"fits: {_size(plan.peak)} of {_size(machine.memory)}")
    lines += [f"does not fit: {problem}" for problem in plan.problems]
    return "\n".join(lines)


def _length(plan: Plan) -> str:
    if plan.num_steps is None:
        return f"{plan.config.train.epochs} epochs of an unknown number of images; give --num-samples"
    images = plan.num_steps * plan.config.train.global_batch
    epochs = f", {images / plan.num_samples:.2f} epochs of {plan.num_samples}" if plan.num_samples else ""
    left = ""
    if plan.branch_step is not None:
        left = f"; {plan.num_steps - plan.branch_step} steps to do, after the {plan.branch_step} of branch_from"
    elif plan.config.branch_from is not None:
        left = "; less the steps of branch_from, which is not there yet"
    return f"{plan.num_steps} steps of {plan.config.train.global_batch} images, {images} in all{epochs}{left}"


def _table(title: str, parts: dict[str, float]) -> list[str]:
    rows = [f"  {name:<42} {_size(value):>10}" for name, value in parts.items() if value]
    return [f"{title}: {_size(sum(parts.values()))}", *rows]


def _size(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
