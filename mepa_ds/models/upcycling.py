"""Sparse upcycling: a mixture-of-experts model that starts from the weights of a dense model (arXiv 2212.05055).

Shapes: C width, F dense hidden width, H hidden width of an expert, E experts, K choices a token.
"""

from __future__ import annotations

import torch

from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig, MoEConfig
from mepa_ds.errors import UserError
from mepa_ds.models.block import Block
from mepa_ds.models.feed_forward import FeedForward
from mepa_ds.models.moe.layer import MoEFeedForward
from mepa_ds.models.moe.routing import Router, ScaleRouter, ScaleTokenRouter, TokenRouter
from mepa_ds.models.transformer import NextScaleTransformer

# With logits this small, all experts have the same probability to fp32 rounding. The router still chooses by logits, so
# the random direction of each token decides which experts are its top K.
_ROUTER_SCALE = 1e-6
NO_BIAS_AFTER_UPCYCLING = (
    "a router fresh from upcycling has probabilities that differ by far less than one step of loss-free balancing, and "
    "all tokens would go to the same experts; set it to 0 (objective.balance_weight balances)"
)


@torch.no_grad()
def upcycle(dense: NextScaleTransformer, moe: MoEConfig, seed: int = 0) -> NextScaleTransformer:
    """Builds a MoE model whose experts are copies of the dense FFN or, where experts are narrower, slices of it.

    Copies (H = F): n = K + (1 if there is a shared expert) FFNs with equal weights process each token, and each counts
    1/n. The output equals that of the dense model to rounding, for any K, E, renormalisation and shared expert.

    Slices (H < F): the shared expert holds the first H hidden units. The experts gK ... gK + K - 1, set g, hold K H of
    the other units, cyclically, from where set g - 1 ended; a unit that a set holds m times counts 1/m. Router rows are
    equal within a set, so that top-K chooses a whole set. If a set and the shared expert cover the dense FFN (n H >= F,
    and K divides E), the output equals that of the dense model to rounding; if not, some hidden units are missing. This
    holds at the start of training: a trained router mixes sets.

    Raises:
        UserError: the model has experts already; experts wider than the dense FFN; expert choice, in which a token has
            any number of experts; loss-free balancing, because the new router's probabilities differ by far less than
            one step of the bias, which would send all tokens to the same experts.
    """
    config = dense.config
    if config.moe is not None:
        raise UserError("upcycling starts from a dense model; this one has experts already")
    if moe.router == "expert_choice":
        raise UserError("model.moe.router: expert_choice gives tokens any number of experts; upcycle with another one")
    if moe.bias_rate:
        raise UserError(f"model.moe.bias_rate: {NO_BIAS_AFTER_UPCYCLING}")
    values = config.model_dump(mode="json") | {"moe": moe.model_dump(mode="json")}
    target_config = validate(ModelConfig, values, "upcycling")
    if target_config.expert_hidden > config.dense_hidden:
        raise UserError(
            f"model.moe.expert_ratio: experts of hidden width {target_config.expert_hidden} cannot be filled from a "
            f"dense FFN of {config.dense_hidden}; use {config.ffn_ratio} or less"
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


def is_fresh_from_upcycling(router: Router) -> bool:
    """Whether the router still has its weights from upcycling; those of an initialisation are of the order of 0.01."""
    return all(parameter.abs().max() < 1e3 * _ROUTER_SCALE for parameter in router.parameters())


def _fill(layer: MoEFeedForward, dense: FeedForward, moe: MoEConfig, hidden: int) -> None:
    """Sets the weights of one MoE layer, with experts of width `hidden`, from those of the dense FFN."""
    dense_hidden, K = dense.fc1.out_features, moe.top_k
    num_ffns = K + (1 if moe.shared_expert else 0)
    # The router's weight of a chosen expert: 1/K with renormalisation, else the even probability 1/E.
    router_weight = 1 / K if moe.renormalize else 1 / moe.num_experts
    sliced = hidden < dense_hidden
    set_E = torch.arange(moe.num_experts) // K
    for parameter in layer.router.parameters():
        parameter.mul_(_ROUTER_SCALE)
    if sliced:
        first_E = set_E * K
        if isinstance(layer.router, TokenRouter):
            layer.router.gate.weight.copy_(layer.router.gate.weight[first_E])
        if isinstance(layer.router, ScaleTokenRouter | ScaleRouter):
            layer.router.scale_logits_SE.copy_(layer.router.scale_logits_SE[:, first_E])

    shared_units = torch.arange(hidden) if moe.shared_expert else torch.arange(0)
    routed_units = torch.arange(hidden if moe.shared_expert and sliced else 0, dense_hidden)
    num_sets = int(set_E.max()) + 1
    units_SKH = routed_units[torch.arange(num_sets * K * hidden).view(num_sets, K, hidden) % len(routed_units)]
    for e in range(moe.num_experts):
        units = units_SKH[e // K, e % K]
        held = torch.cat([shared_units, units_SKH[e // K].flatten()]).bincount(minlength=dense_hidden)
        layer.experts.fc1_weight[e] = dense.fc1.weight[units]
        layer.experts.fc1_bias[e] = dense.fc1.bias[units]
        layer.experts.fc2_weight[e] = dense.fc2.weight[:, units] / (held[units] * router_weight)
        layer.experts.fc2_bias[e] = dense.fc2.bias / (num_ffns * router_weight)
    if layer.shared is not None:
        layer.shared.fc1.weight.copy_(dense.fc1.weight[shared_units])
        layer.shared.fc1.bias.copy_(dense.fc1.bias[shared_units])
        layer.shared.fc2.weight.copy_(dense.fc2.weight[:, shared_units] / (1 if sliced else num_ffns))
        layer.shared.fc2.bias.copy_(dense.fc2.bias / num_ffns)
