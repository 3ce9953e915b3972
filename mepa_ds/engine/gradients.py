"""Gradients in DeepSpeed's ZeRO optimizer: their norm, and on one rank their way into the flat gradient.

DeepSpeed copies each gradient to fp64 for the norm by which it clips, after it has read each twice to look for values
that are not finite. Here each is read once, and a norm that is not finite tells of such values
(benchmarks/optimizer.py).

ZeRO copies a gradient into a bucket, from there into its partition, and all of these into one flat tensor. With one
rank there is nothing to reduce, so one copy is enough, and no bucket is needed (1 GB in bf16 with ds_configs).

This file replaces methods of DeepSpeed's ZeRO optimizer, one instance's: the version is pinned.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup
from torch import Tensor, nn

_CHUNK = 2**17
"""Elements that are squared at a time on a CPU, so that they stay in its cache."""
_NOT_FINITE = -1.0
"""By this, DeepSpeed knows that a group's norm is not finite."""


def sum_of_squares(gradients: list[Tensor]) -> Tensor:
    """Returns the fp32 sum of all squares, as a scalar; infinite or NaN if a value is, or beyond 1e19.

    Sums are formed in a tree, so that fp32 keeps 6 digits and more whatever their length.
    """
    if not gradients:
        return torch.zeros(())
    if gradients[0].is_cuda:
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
    chunks = (chunk for gradient in gradients for chunk in gradient.reshape(-1).split(_CHUNK))
    return torch.stack([chunk.float().square().sum() for chunk in chunks]).double().sum().float()


def take_over_norm(zero: Any) -> None:
    """Makes DeepSpeed's ZeRO optimizer compute norms by `sum_of_squares`, and judge by them whether to step."""

    def norm_over_ranks(gradients: list[Tensor], params: list[Tensor], norm_type: float = 2) -> Tensor:
        """Returns one parameter group's norm over all ranks. Collective."""
        assert norm_type == 2
        own = [gradient.detach() for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        total = sum_of_squares(own).to(zero.device)
        dist.all_reduce(total, group=zero.dp_process_group)
        return torch.where(total.isfinite(), total.sqrt(), _NOT_FINITE)

    def check_overflow(partition_gradients: bool = True) -> None:
        """Does nothing: `step` takes a norm that is not finite for an overflow."""

    zero.get_grad_norm_direct = norm_over_ranks
    if zero.compute_grad_norm:  # a user's DeepSpeed file may turn it off
        zero.check_overflow = check_overflow


def gathers_directly(knobs: dict[str, Any], world_size: int) -> bool:
    """Whether `gather_directly` can be used with DeepSpeed's `knobs`, of `deepspeed_config.read_knobs` or `build`.

    A type of its own for sums of gradients (`grad_accum_dtype`) takes another way in DeepSpeed.
    """
    accumulates_in = (knobs.get("data_types") or {}).get("grad_accum_dtype")
    return world_size == 1 and knobs["zero_optimization"]["stage"] == 2 and accumulates_in is None


def gather_directly(zero: Any) -> None:
    """Makes DeepSpeed's ZeRO-2 optimizer on one rank gather gradients in flat tensors, which live as long as it does.

    Sums over micro-batches are formed in the gradients' own type, as DeepSpeed forms them.
    """
    assert dist.get_world_size() == 1
    gathered = [_FlatGradient(parameters, size) for parameters, size in _groups(zero)]
    places = {parameter: flat for flat in gathered for parameter in flat.views}

    def process_gradients(parameter: nn.Parameter, group: int) -> None:
        """Is called when the gradient of a micro-batch is complete."""
        assert parameter.grad is not None
        places[parameter].add(parameter)

    def epilogue() -> None:
        """Is called at the end of a backward pass."""
        if zero.is_gradient_accumulation_boundary():
            for number, flat in enumerate(gathered):
                zero.averaged_gradients[number] = flat.taken()
        zero._epilogue_ran_this_backward = True

    zero.process_gradients = process_gradients
    zero.independent_gradient_partition_epilogue = epilogue


def _groups(zero: Any) -> list[tuple[list[nn.Parameter], int]]:
    """The parameters of each group, in the order in which the partition holds them, and its elements with padding."""
    groups = []
    for number in range(len(zero.bit16_groups)):
        parameters, start = zero.params_in_partition[number], 0
        for parameter in parameters:
            assert zero.grad_partition_insertion_offset[number][0][zero.get_param_id(parameter)] == start
            start += parameter.numel()
        groups.append((parameters, int(zero.partition_size[number])))
    return groups


class _FlatGradient:
    """The gradient of one parameter group."""

    def __init__(self, parameters: list[nn.Parameter], size: int):
        self._flat = torch.zeros(size, dtype=parameters[0].dtype, device=parameters[0].device)
        lengths = [parameter.numel() for parameter in parameters]
        *pieces, padding = self._flat.split([*lengths, size - sum(lengths)])
        self.views: dict[nn.Parameter, Tensor] = dict(zip(parameters, pieces, strict=True))
        padding._zero_padding = True  # type: ignore[attr-defined]  # DeepSpeed's mark
        self._padding = padding
        self._filled: set[nn.Parameter] = set()

    def add(self, parameter: nn.Parameter) -> None:
        """Takes a parameter's gradient over: the first of a step is copied, later ones are added."""
        assert parameter.grad is not None
        view, gradient = self.views[parameter], parameter.grad.reshape(-1)
        if parameter in self._filled:
            view.add_(gradient)
        else:
            view.copy_(gradient)
            self._filled.add(parameter)
        parameter.grad = None

    def taken(self) -> GradPartitionBufferGroup:
        """The step's gradient, in the form in which ZeRO takes one that is already flat. The next step starts anew."""
        for parameter, view in self.views.items():
            if parameter not in self._filled:  # no loss reached it
                view.zero_()
        self._filled.clear()
        return GradPartitionBufferGroup([*self.views.values(), self._padding], self._flat)
