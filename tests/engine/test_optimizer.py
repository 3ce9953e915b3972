"""The fused AdamW that the engine builds: PyTorch's plain one to rounding, whatever way ZeRO cuts the weights."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mepa_ds.checkpoint.fragment import EXP_AVG
from mepa_ds.config.optim import PretrainOptimConfig
from mepa_ds.engine.fragments import adam_step, flat_partitions, set_adam_step
from mepa_ds.engine.optimizer import build_optimizer

NUMBER, STEPS = 1003, 5


def weights_after_steps(cut: slice, fused: bool | None = None) -> Tensor:
    """A part of the weights, after steps with its part of the gradients. `fused` None: as the engine builds it."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(NUMBER, generator=generator)[cut, None].clone())
    config = PretrainOptimConfig(base_lr=1e-3)
    optimizer: torch.optim.AdamW = build_optimizer(model, config, width=64)
    if fused is not None:
        groups = [{**group, "fused": fused} for group in optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, lr=config.base_lr, betas=config.betas, eps=config.eps)
    else:
        assert all(group["fused"] for group in optimizer.param_groups)
    for _ in range(STEPS):
        model.weight.grad = torch.randn(NUMBER, generator=generator)[cut, None].clone()
        optimizer.step()
    return model.weight.detach()[:, 0]


def test_equals_the_plain_one() -> None:
    torch.testing.assert_close(
        weights_after_steps(slice(None)), weights_after_steps(slice(None), fused=False), atol=1e-6, rtol=1e-6
    )


def test_an_element_does_not_depend_on_its_neighbours() -> None:
    """So a checkpoint of other partitions goes on with the same bits."""
    whole = weights_after_steps(slice(None))
    for cut in (slice(1, None), slice(3, 700), slice(NUMBER - 5, None)):
        torch.testing.assert_close(weights_after_steps(cut), whole[cut], atol=0, rtol=0)


def test_the_count_of_steps_is_where_the_weights_are() -> None:
    """The fused kernel of a GPU reads it there."""
    zero: Any = SimpleNamespace(
        single_partition_of_fp32_groups=[torch.zeros(4, device="meta")],
        optimizer=SimpleNamespace(state=defaultdict(dict)),
    )
    flat_partitions(zero, EXP_AVG)
    (state,) = zero.optimizer.state.values()
    assert state["step"].device.type == state[EXP_AVG].device.type == "meta"
    zero.single_partition_of_fp32_groups = [torch.zeros(4)]
    set_adam_step(zero, 7)
    assert adam_step(zero) == 7
