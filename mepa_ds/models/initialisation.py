"""Initial weights as VAR draws them, each parameter from a random stream of its own.

The values of a parameter depend only on the seed and on its name; those of an expert also on its global number. So they
are the same on any number of ranks, at any expert-parallel size, and when layers are added or reordered.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mepa_ds.models.feed_forward import FeedForward
from mepa_ds.models.moe.experts import Experts
from mepa_ds.models.moe.layer import MoEFeedForward
from mepa_ds.models.moe.routing import Router
from mepa_ds.models.parametrisation import init_factor, width_multiplier
from mepa_ds.random_streams import generator

if TYPE_CHECKING:
    from mepa_ds.models.block import Block
    from mepa_ds.models.transformer import NextScaleTransformer


@torch.no_grad()
def init_weights(model: NextScaleTransformer, seed: int, base_width: int | None = None) -> None:
    """Draws all weights by VAR's scheme; with a base width, by muP's (mepa_ds.models.parametrisation) on top of it.

    Weights and embeddings are truncated normal with std sqrt(1 / 3C), biases are zero. Projections that write to the
    residual stream, also those of experts, are divided by sqrt(2 depth). The head and AdaLN have factors of their own.
    """
    config = model.config
    m = width_multiplier(config.C, base_width)
    standard = math.sqrt(1 / (3 * config.C))
    experts_first = {
        f"{name}.experts": module.first_expert
        for name, module in model.named_modules()
        if isinstance(module, MoEFeedForward)
    }
    for name, parameter in model.named_parameters():
        parent, _, leaf = name.rpartition(".")
        factor = init_factor(name, m)
        std = standard * factor
        if leaf.endswith("bias"):
            parameter.zero_()
        elif leaf == "log_temperature":
            parameter.fill_(math.log(4.0))
        elif leaf == "scale_logits_SE":
            # This is the product of an embedding and a gate; both would be drawn with the standard deviation.
            _draw(parameter, math.sqrt(config.C) * standard * standard * factor, generator(seed, "init", name))
        elif parent in experts_first:
            for local, weight in enumerate(parameter):
                _draw(weight, std, generator(seed, "init", name, experts_first[parent] + local))
        else:
            _draw(parameter, std, generator(seed, "init", name))
    for module in model.modules():
        if isinstance(module, Router) and module.bias_rate:
            module.bias_steps_E.zero_()
    _scale_special(model)


def _draw(parameter: Tensor, std: float, stream: torch.Generator) -> None:
    # Numbers are drawn on the CPU, so that the weights are the same on every device.
    drawn = torch.empty(parameter.shape, dtype=torch.float32)
    nn.init.trunc_normal_(drawn, std=std, generator=stream)
    parameter.copy_(drawn)


def _scale_special(model: NextScaleTransformer) -> None:
    config = model.config
    residual = 1 / math.sqrt(2 * config.depth)
    model.head.weight.mul_(config.head_init)
    model.head_adaln.weight.mul_(config.adaln_init)
    for block in cast("list[Block]", list(model.blocks)):
        block.attention.proj.weight.mul_(residual)
        for module in block.ffn.modules():
            if isinstance(module, Experts):
                module.fc2_weight.mul_(residual)
            elif isinstance(module, FeedForward):
                module.fc2.weight.mul_(residual)
        if config.shared_adaln:
            # VAR draws the offsets with std 1 / sqrt(C): sqrt(3) times the std of the other weights.
            block.adaln_offset.mul_(math.sqrt(3))
            gates, rest = block.adaln_offset[:, :, :2], block.adaln_offset[:, :, 2:]
        else:
            gates, rest = block.adaln.weight[: 2 * config.C], block.adaln.weight[2 * config.C :]
        gates.mul_(config.adaln_gamma_init)
        rest.mul_(config.adaln_init)
