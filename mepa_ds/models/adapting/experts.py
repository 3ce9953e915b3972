"""The weights of a mixture of experts for a mixture of more experts.

Shapes: E experts, S scales, C width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.random_streams import generator

_NOISE = 1e-2
"""Of the new experts' router rows, in shares of their standard deviation: enough to tell copies apart."""
_BY_EXPERT = (".experts.fc1_weight", ".experts.fc1_bias", ".experts.fc2_weight", ".experts.fc2_bias", ".gate.weight")
_LAST_BY_EXPERT = (".scale_logits_SE", ".bias_steps_E")


def more_experts(state: Mapping[str, Tensor], num_experts: int, seed: int = 0) -> dict[str, Tensor]:
    """The weights for `num_experts` experts, which is no fewer than there are: expert e is a copy of e modulo E.

    Copies differ by noise in the router alone. Where all experts have the same number of copies m, and top_k is m times
    as large, too, the output is that of the old model but for that noise: a copy has 1 / m of the probability. With
    another top_k, tokens lose some of their choices to copies of their first.

    Raises:
        UserError: fewer experts; nothing in the weights says which of them to leave out.
    """
    adapted = dict(state)
    for name, tensor in state.items():
        if name.endswith(_BY_EXPERT):
            adapted[name] = _copied(name, tensor, 0, num_experts, seed)
        elif name.endswith(_LAST_BY_EXPERT):
            adapted[name] = _copied(name, tensor, tensor.ndim - 1, num_experts, seed)
    return adapted


def _copied(name: str, tensor: Tensor, dim: int, num_experts: int, seed: int) -> Tensor:
    count = tensor.shape[dim]
    if num_experts < count:
        raise UserError(
            f"model.moe.num_experts: the weights have {count} experts, and nothing says which of them to leave out for "
            f"{num_experts}; give {count} or more"
        )
    copied = tensor.index_select(dim, torch.arange(num_experts) % count)
    if (name.endswith(".gate.weight") or name.endswith(".scale_logits_SE")) and num_experts > count:
        noise = (
            torch.randn(copied.shape, generator=generator(seed, "more experts", name)) * tensor.float().std() * _NOISE
        )
        noise.narrow(dim, 0, count).zero_()
        copied = copied + noise.to(copied)
    return copied
