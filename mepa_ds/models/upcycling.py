"""Sparse upcycling: a mixture-of-experts model that starts from a dense one's weights (arXiv 2212.05055).

Shapes: C width, F dense hidden width, H hidden width of an expert, E experts, K choices a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig, MoEConfig
from mepa_ds.errors import UserError
from mepa_ds.models.feed_forward import FeedForward
from mepa_ds.models.moe.layer import MoEFeedForward
from mepa_ds.models.transformer import Block, NextScaleTransformer

# So small that all experts have the same probability to fp32 rounding; which of them are the top K is left to the
# (random) direction of each token.
_ROUTER_SCALE = 1e-6


@torch.no_grad()
def upcycle(dense: NextScaleTransformer, moe: MoEConfig, seed: int = 0) -> NextScaleTransformer:
    """Builds a MoE model whose experts are copies of the dense FFN, or slices of it where experts are narrower.

    With copies (expert hidden width = dense hidden width, dropless) the output equals the dense model's to rounding,
    whatever K, E, renormalisation and shared expert: n = K + (1 if shared) FFNs of equal weights see each token, and
    each counts 1/n. With slices, expert e holds the hidden units eH, eH + 1, ... (cyclically) and the expected sum over
    experts is the dense output; equality is not possible, since a token passes only some of the slices.

    Raises UserError for a model that has experts already, or experts wider than the dense FFN.
    """
    config = dense.config
    if config.moe is not None:
        raise UserError("upcycling starts from a dense model; this one has experts already")
    values = config.model_dump(mode="json") | {"moe": moe.model_dump(mode="json")}
    target_config = validate(ModelConfig, values, "upcycling")
    dense_hidden = round(config.ffn_ratio * config.C)
    if target_config.expert_hidden > dense_hidden:
        raise UserError(
            f"model.moe.expert_ratio: experts of hidden width {target_config.expert_hidden} cannot be filled from a "
            f"dense FFN of {dense_hidden}; use {config.ffn_ratio} or less"
        )
    target = NextScaleTransformer(target_config)
    target.init_weights(seed)
    missing, unexpected = target.load_state_dict(
        {name: tensor for name, tensor in dense.state_dict().items() if name in target.state_dict()}, strict=False
    )
    assert not unexpected
    assert all(".ffn." in name for name in missing)
    for old, new in zip(dense.blocks, target.blocks, strict=True):
        assert isinstance(old, Block)
        assert isinstance(new, Block)
        if isinstance(new.ffn, MoEFeedForward):
            assert isinstance(old.ffn, FeedForward)
            _fill(new.ffn, old.ffn, moe, target_config.expert_hidden)
    return target.eval()


def _fill(layer: MoEFeedForward, dense: FeedForward, moe: MoEConfig, hidden: int) -> None:
    dense_hidden = dense.fc1.out_features
    num_ffns = moe.top_k + (1 if moe.shared_expert else 0)
    # What the router multiplies a chosen expert with: 1/K after renormalisation, else the even probability 1/E.
    router_weight = 1 / moe.top_k if moe.renormalize else 1 / moe.num_experts
    share = dense_hidden / (num_ffns * hidden)
    for parameter in layer.router.parameters():
        parameter.mul_(_ROUTER_SCALE)

    def units(number: int) -> Tensor:
        return (number * hidden + torch.arange(hidden)) % dense_hidden

    for e in range(moe.num_experts):
        layer.experts.fc1_weight[e] = dense.fc1.weight[units(e)]
        layer.experts.fc1_bias[e] = dense.fc1.bias[units(e)]
        layer.experts.fc2_weight[e] = dense.fc2.weight[:, units(e)] * (share / router_weight)
        layer.experts.fc2_bias[e] = dense.fc2.bias / (num_ffns * router_weight)
    if layer.shared is not None:
        # The slice after the last routed expert's, so that narrow experts and the shared one overlap least.
        own = units(moe.num_experts)
        layer.shared.fc1.weight.copy_(dense.fc1.weight[own])
        layer.shared.fc1.bias.copy_(dense.fc1.bias[own])
        layer.shared.fc2.weight.copy_(dense.fc2.weight[:, own] * share)
        layer.shared.fc2.bias.copy_(dense.fc2.bias / num_ffns)
