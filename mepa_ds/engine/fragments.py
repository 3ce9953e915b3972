"""Views of ZeRO's flat partitions as pieces of whole, named parameters.

A fragment is a run of consecutive elements of one flattened parameter. Stacked experts are one parameter of E experts
at every expert-parallel size, since each rank holds consecutive experts. So names, sizes and offsets do not depend on
the topology, and no communication is needed to form them.

This file reads DeepSpeed's internals (`_hp_mapping`, `single_partition_of_fp32_groups`): the version is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mepa_ds.checkpoint.fragment import BUFFER, MASTER, Fragment
from mepa_ds.engine.expert_parallel import ExpertParallelFeedForward


def parameter_layout(model: nn.Module) -> dict[str, tuple[torch.Size, int]]:
    """Returns name -> (shape of the whole parameter over all ranks, this rank's offset in its flattened elements)."""
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
    """Returns this rank's flat fp32 partitions of one kind, one per group. Adam's are made (zero) if missing."""
    partitions = zero.single_partition_of_fp32_groups
    if kind == MASTER:
        return [partition.detach() for partition in partitions]
    for partition in partitions:
        state = zero.optimizer.state[partition]
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=partition.device))
        state.setdefault(kind, torch.zeros_like(partition))
    return [zero.optimizer.state[partition][kind] for partition in partitions]


def parameter_fragments(model: nn.Module, flats: Mapping[str, list[Tensor]]) -> Iterator[Fragment]:
    """Yields all pieces that this rank owns, as views of `flats` (partitions by kind, in ZeRO's layout)."""
    layout = parameter_layout(model)
    for name, parameter in model.named_parameters():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # this rank's partition has no element of this parameter
            continue
        shape, start = layout[name]
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        for kind, partitions in flats.items():
            data = partitions[mapping.param_group_index].narrow(0, hp.start, hp.numel)
            yield Fragment(f"{kind}/{name}", shape.numel(), start + lp.start, data)


def buffer_fragments(model: nn.Module) -> Iterator[Fragment]:
    """Yields the model's buffers, which are the same on every rank."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        if name not in parameters:
            yield Fragment(f"{BUFFER}/{name}", tensor.numel(), 0, tensor.view(-1))


def adam_step(zero: Any) -> int:
    """Returns how many optimizer steps Adam's bias correction has seen."""
    states = [zero.optimizer.state.get(partition, {}) for partition in zero.single_partition_of_fp32_groups]
    return max((int(state["step"]) for state in states if "step" in state), default=0)


LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scaler_state(zero: Any) -> dict[str, float]:
    """Returns the state of fp16's dynamic loss scale; empty in other precisions."""
    scaler = zero.loss_scaler
    return {name: float(getattr(scaler, name)) for name in LOSS_SCALER} if scaler.dynamic else {}


def set_loss_scaler_state(zero: Any, state: dict[str, float]) -> None:
    for name, value in state.items() if zero.loss_scaler.dynamic else ():
        setattr(zero.loss_scaler, name, value if name == "cur_scale" else int(value))


def set_adam_step(zero: Any, step: int) -> None:
    """Sets the count of steps, on the partitions' device: the fused AdamW reads it there."""
    for partition in zero.single_partition_of_fp32_groups:
        zero.optimizer.state[partition]["step"] = torch.tensor(float(step), device=partition.device)
