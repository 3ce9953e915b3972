"""ZeRO's flat partitions seen as pieces of whole, named parameters.

A fragment is a run of consecutive elements of one flattened parameter. Stacked experts are one parameter of E
experts whatever the expert-parallel size, since rank i holds consecutive ones. So names, sizes and offsets do not
know the topology (D5), and no communication is needed to form them.

This file reads DeepSpeed's internals (`_hp_mapping`, `single_partition_of_fp32_groups`): the version is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mepa_ds.engine.expert_parallel import ExpertParallelFeedForward

# What is kept of every parameter: the fp32 master and Adam's moments.
KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements [offset, offset + len(data)) of the flattened parameter `name`, which has `numel` elements."""

    name: str
    numel: int
    offset: int
    data: Tensor


def parameter_layout(model: nn.Module) -> dict[str, tuple[torch.Size, int]]:
    """Name -> (shape of the whole parameter over all ranks, this rank's offset in its flattened elements)."""
    expert_parameters = {
        f"{prefix}.experts.{name}": module
        for prefix, module in model.named_modules()
        if isinstance(module, ExpertParallelFeedForward)
        for name, _ in module.experts.named_parameters()
    }
    layout = {}
    for name, parameter in model.named_parameters():
        shape, offset = parameter.shape, 0
        if (layer := expert_parameters.get(name)) is not None:
            offset = layer.first_expert * parameter[0].numel()
            shape = torch.Size([layer.num_experts, *shape[1:]])
        layout[name] = (shape, offset)
    return layout


def flat_partitions(zero: Any, kind: str) -> list[Tensor]:
    """This rank's flat fp32 partitions of one kind, one a parameter group. Adam's are made (zero) if not there yet."""
    partitions = zero.single_partition_of_fp32_groups
    if kind == "master":
        return list(partitions)
    for partition in partitions:
        state = zero.optimizer.state[partition]
        state.setdefault("step", torch.zeros((), dtype=torch.float32))
        state.setdefault(kind, torch.zeros_like(partition))
    return [zero.optimizer.state[partition][kind] for partition in partitions]


def fragments(model: nn.Module, zero: Any, kinds: tuple[str, ...] = KINDS) -> Iterator[Fragment]:
    """All pieces that this rank owns, as views: writing into `data` writes into the optimizer's state."""
    flats = {kind: flat_partitions(zero, kind) for kind in kinds}
    for name, (shape, start) in parameter_layout(model).items():
        mapping = dict(model.named_parameters())[name]._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # none of this parameter lies in this rank's partition
            continue
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        for kind, partitions in flats.items():
            data = partitions[mapping.param_group_index].detach().narrow(0, hp.start, hp.numel)
            yield Fragment(f"{kind}/{name}", shape.numel(), start + lp.start, data)


def adam_step(zero: Any) -> int:
    """Optimizer steps that Adam's bias correction has seen."""
    states = [zero.optimizer.state.get(partition, {}) for partition in zero.single_partition_of_fp32_groups]
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def set_adam_step(zero: Any, step: int) -> None:
    for partition in zero.single_partition_of_fp32_groups:
        zero.optimizer.state[partition]["step"] = torch.tensor(float(step))
