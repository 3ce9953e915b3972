"""The weights of a mixture of experts for a mixture of more experts, or of fewer.

Shapes: E experts, S scales, C width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        UserError: fewer experts; nothing in the weights says which of them to leave out (`fewer_experts` is told).
    """
    adapted = dict(state)
    for name, tensor in state.items():
        if (dim := _dim_of_experts(name, tensor)) is not None:
            adapted[name] = _copied(name, tensor, dim, num_experts, seed)
    return adapted


def fewer_experts(state: Mapping[str, Tensor], kept: Mapping[int, Sequence[int]]) -> dict[str, Tensor]:
    """The weights with these experts alone, by the index of their block, in the order given.

    A router's probabilities are then shares among the kept ones, so the output is another one, even for tokens whose
    experts are all kept: training has to go on from here.
    """
    adapted = dict(state)
    for name, tensor in state.items():
        if (dim := _dim_of_experts(name, tensor)) is not None:
            block = int(name.split(".")[1])
            adapted[name] = tensor.index_select(dim, torch.tensor(kept[block]))
    return adapted


def most_used(
    loads: Mapping[int, Sequence[Sequence[float]]], lengths: Sequence[int], count: int
) -> dict[int, list[int]]:
    """The `count` experts of each block that most tokens went to, by rising index.

    Args:
        loads: each block's share of each expert in a scale's tokens, (S, E).
        lengths: tokens of each scale, (S,).
    """
    kept = {}
    for block, load_SE in loads.items():
        tokens_E = torch.tensor(lengths, dtype=torch.float64) @ torch.tensor(load_SE, dtype=torch.float64)
        kept[block] = sorted(tokens_E.argsort(descending=True, stable=True)[:count].tolist())
    return kept


def _dim_of_experts(name: str, tensor: Tensor) -> int | None:
    """Along which the tensor has one part for each expert; None: it is not of routed experts or their router."""
    if name.endswith(_BY_EXPERT):
        return 0
    return tensor.ndim - 1 if name.endswith(_LAST_BY_EXPERT) else None


def _copied(name: str, tensor: Tensor, dim: int, num_experts: int, seed: int) -> Tensor:
    count = tensor.shape[dim]
    if num_experts < count:
        raise UserError(
            f"model.moe.num_experts: the weights have {count} experts, and nothing in them says which to leave out for "
            f"{num_experts}; give {count} or more, or keep the most used ones, with `mepa upcycle --num-experts "
            f"{num_experts} --run RUN`, where RUN is the run that trained them"
        )
    copied = tensor.index_select(dim, torch.arange(num_experts) % count)
    if (name.endswith(".gate.weight") or name.endswith(".scale_logits_SE")) and num_experts > count:
        spread = tensor.float().std(correction=0)  # a single number has none
        noise = torch.randn(copied.shape, generator=generator(seed, "more experts", name)) * spread * _NOISE
        noise.narrow(dim, 0, count).zero_()
        copied = copied + noise.to(copied)
    return copied
