"""The MoE layer against a double loop over tokens and choices."""

from __future__ import annotations

from dataclasses import fields
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig
from mepa_ds.models.moe.dispatch import TokenPermutation
from mepa_ds.models.moe.layer import MoEFeedForward
from mepa_ds.models.moe.routing import Routing
from mepa_ds.models.transformer import NextScaleTransformer

SCALES = (1, 2, 3)
L = 14


def make_layer(seed: int = 0, width: int = 16, **moe: object) -> MoEFeedForward:
    values = {"depth": 1, "width": width, "num_heads": 2, "scales": list(SCALES), "moe": {"expert_ratio": 1.5, **moe}}
    layer = MoEFeedForward(validate(ModelConfig, values, "model"))
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return layer


def naive_forward(layer: MoEFeedForward, x_BLC: Tensor, scale_index_L: Tensor) -> Tensor:
    """One token, one choice at a time, in the words of the paper."""
    out = torch.zeros_like(x_BLC)
    router: Any = layer.router
    experts = layer.experts
    for b in range(x_BLC.shape[0]):
        for position in range(x_BLC.shape[1]):
            x = x_BLC[b, position]
            logits = torch.zeros(layer.num_experts)
            if hasattr(router, "gate"):
                logits = logits + router.gate.weight @ x
            if hasattr(router, "scale_logits_SE"):
                logits = logits + router.scale_logits_SE[scale_index_L[position]]
            probs = logits.softmax(-1)
            chosen = probs.argsort(descending=True)[: router.top_k].tolist()
            norm = probs[chosen].sum() if router.renormalize else 1.0
            y = torch.zeros_like(x)
            for e in chosen:
                hidden = F.gelu(experts.fc1_weight[e] @ x + experts.fc1_bias[e], approximate="tanh")
                y = y + probs[e] / norm * (experts.fc2_weight[e] @ hidden + experts.fc2_bias[e])
            if layer.shared is not None:
                hidden = F.gelu(layer.shared.fc1.weight @ x + layer.shared.fc1.bias, approximate="tanh")
                y = y + layer.shared.fc2.weight @ hidden + layer.shared.fc2.bias
            out[b, position] = y
    return out


def gradients(layer: MoEFeedForward, y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    target = torch.sin(torch.arange(y.numel(), dtype=torch.float32)).view_as(y)
    found = torch.autograd.grad((y * target).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


def assert_same_as_naive(layer: MoEFeedForward, x_BLC: Tensor) -> None:
    scale_index_L = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 4, 9]))
    x_BLC.requires_grad_()
    inputs = [x_BLC, *layer.parameters()]
    y, _ = layer(x_BLC, scale_index_L)
    expected = naive_forward(layer, x_BLC, scale_index_L)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, ours, theirs in zip(names, gradients(layer, y, inputs), gradients(layer, expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=f"{name}: {{}}".format)


@settings(max_examples=25, deadline=None)
@given(
    moe=st.fixed_dictionaries(
        {
            "router": st.sampled_from(["stmoe", "smoe", "token"]),
            "num_experts": st.integers(1, 9),
            "top_k": st.integers(1, 4),
            "renormalize": st.booleans(),
            "shared_expert": st.booleans(),
            "expert_ratio": st.sampled_from([0.5, 1.0, 1.5, 3.0]),
        }
    ),
    grouped=st.booleans(),
    width=st.sampled_from([4, 8, 16, 28]),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_layer_equals_a_double_loop(moe: dict[str, Any], grouped: bool, width: int, batch: int, seed: int) -> None:
    """With the experts of a CPU, and with those of a GPU (which PyTorch emulates here)."""
    top_k = moe["top_k"]
    moe |= {"num_experts": max(moe["num_experts"], top_k), "renormalize": moe["renormalize"] and top_k > 1}
    layer = make_layer(seed, width, **moe)
    x = torch.randn(batch, L, width, generator=torch.Generator().manual_seed(seed))
    with patch("mepa_ds.models.moe.experts.has_grouped_kernel", lambda _: grouped):
        assert_same_as_naive(layer, x)


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_expert_takes_all_tokens_and_others_none(top_k: int) -> None:
    layer = make_layer(num_experts=6, top_k=top_k)
    router: Any = layer.router
    router.scale_logits_SE.data[:, 4] = 100.0
    router.scale_logits_SE.data[:, 2] = 50.0
    router.gate.weight.data *= 0.01
    assert_same_as_naive(layer, torch.randn(2, L, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropped", [False, True])
def test_combining_low_precision_rows_rounds_nothing_but_the_rows_gradient(dtype: torch.dtype, dropped: bool) -> None:
    """Against fp32 on the same values: 1e-5, but the gradient that leaves in the rows' type, which is rounded once."""
    torch.manual_seed(0)
    T, K, C, E = 50, 3, 64, 5
    weight_TK = torch.rand(T, K).requires_grad_()
    index_TK = torch.rand(T, E).topk(K).indices
    kept_TK = torch.rand(T, K) < 0.6 if dropped else None
    permutation = TokenPermutation(
        torch.empty(T, C), Routing(torch.empty(T, E), torch.empty(T, E), index_TK, weight_TK, kept_TK), E
    )
    num_rows = int(permutation.counts_E.sum())
    permutation.permute(num_rows)
    y_RC = torch.randn(num_rows, C).to(dtype)
    gradient_TC = torch.randn(T, C)
    results = []
    for values_RC in (y_RC, y_RC.float()):
        rows_RC = values_RC.clone().requires_grad_()
        out_TC = permutation.unpermute(rows_RC)
        assert out_TC.dtype == torch.float32
        results.append((out_TC, *torch.autograd.grad(out_TC, [weight_TK, rows_RC], gradient_TC)))
    (out, grad_weight, grad_rows), (expected_out, expected_weight, expected_rows) = results
    torch.testing.assert_close(out, expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad_weight, expected_weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad_rows, expected_rows.to(dtype), atol=0, rtol=0)


def test_autocast_does_not_reach_routing() -> None:
    layer = make_layer(num_experts=4, top_k=2, width=64)
    scale_index_L = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 4, 9]))
    x = torch.randn(50, L, 64)
    _, expected = layer(x, scale_index_L)
    with torch.autocast("cpu", torch.bfloat16):
        y, found = layer(x, scale_index_L)
    assert y.dtype == torch.float32
    for field in fields(expected):
        assert torch.equal(getattr(found, field.name), getattr(expected, field.name)), field.name


def test_statistics_count_every_pair() -> None:
    layer = make_layer(num_experts=4, top_k=2)
    scale_index_L = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 4, 9]))
    _, statistics = layer(torch.randn(5, L, 16), scale_index_L)
    assert statistics.tokens_S.tolist() == [5, 20, 45]
    assert statistics.counts_SE.sum(-1).tolist() == [10, 40, 90]
    torch.testing.assert_close(statistics.prob_sum_SE.sum(-1), statistics.tokens_S)
    assert (statistics.dropped_S == 0).all()
    entropy_S = statistics.entropy_sum_S / statistics.tokens_S
    assert ((entropy_S > 0) & (entropy_S <= torch.tensor(4.0).log() + 1e-6)).all()


def test_initial_weights_are_a_function_of_seed_and_name() -> None:
    shallow = NextScaleTransformer.from_preset("mepa-d2", num_classes=3, scales=SCALES, codebook_size=16)
    again = NextScaleTransformer.from_preset("mepa-d2", num_classes=3, scales=SCALES, codebook_size=16)
    for (name, ours), (_, theirs) in zip(shallow.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    more = NextScaleTransformer.from_preset(
        "mepa-d2", num_classes=3, scales=SCALES, codebook_size=16, moe={"num_experts": 12}
    )
    ours, theirs = (model.get_parameter("blocks.1.ffn.experts.fc1_weight") for model in (shallow, more))
    assert torch.equal(ours, theirs[:8])  # an expert's values depend on its own number alone


def test_initialisation_follows_var() -> None:
    model = NextScaleTransformer.from_preset("mepa-d8", num_classes=10, scales=(1, 2))
    C, depth = 512, 8
    std = (1 / (3 * C)) ** 0.5
    block: Any = model.blocks[3]
    expected: dict[Tensor, float] = {
        block.attention.qkv.weight: std,
        block.attention.proj.weight: std / (2 * depth) ** 0.5,
        block.ffn.shared.fc2.weight: std / (2 * depth) ** 0.5,
        block.ffn.experts.fc1_weight: std,
        block.ffn.experts.fc2_weight: std / (2 * depth) ** 0.5,
        block.adaln.weight[: 2 * C]: std * 1e-3,
        block.adaln.weight[2 * C :]: std * 0.5,
        model.head.weight: std * 0.02,
        model.head_adaln.weight: std * 0.5,
        model.class_embed.weight: std,
    }
    for weight, wanted in expected.items():
        assert weight.std().item() == pytest.approx(wanted, rel=0.05)
    assert not block.ffn.experts.fc1_bias.any()
    assert (block.attention.log_temperature.exp() - 4).abs().max() < 1e-5


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 40), num_experts=st.integers(2, 6), capacity=st.integers(1, 12), seed=st.integers(0, 1000))
def test_capacity_keeps_the_heaviest_pairs(tokens: int, num_experts: int, capacity: int, seed: int) -> None:
    from mepa_ds.models.moe.routing import within_capacity

    generator = torch.Generator().manual_seed(seed)
    weight, index = torch.rand(tokens, num_experts, generator=generator).topk(2, dim=-1)
    kept = within_capacity(index, weight, num_experts, capacity)
    for e in range(num_experts):
        pairs = [(-weight[t, k].item(), t, k) for t in range(tokens) for k in range(2) if index[t, k] == e]
        expected = {(t, k) for _, t, k in sorted(pairs)[:capacity]}
        assert {(t, k) for _, t, k in pairs if kept[t, k]} == expected


def test_capacity_drops_are_reported_and_only_in_training() -> None:
    layer = make_layer(num_experts=4, top_k=2, capacity_factor=0.53)
    scale_index_L = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 4, 9]))
    x = torch.randn(4, L, 16)
    y, statistics = layer(x, scale_index_L)
    pairs = 2 * statistics.tokens_S
    torch.testing.assert_close(statistics.counts_SE.sum(-1), pairs)
    capacity = 15  # of 4 x 14 tokens with two choices each, 0.53 of a quarter: 14.84, rounded up
    assert statistics.dropped_S.sum() == (statistics.counts_SE.sum(0) - capacity).clamp_min(0).sum()
    assert statistics.dropped_S.sum() >= pairs.sum() - 4 * capacity > 0
    assert torch.isfinite(y).all()
    _, dropless = layer.eval()(x, scale_index_L)
    assert dropless.dropped_S.sum() == 0
    # Balancing sees what the router wants, not what the limit leaves of it.
    torch.testing.assert_close(statistics.counts_SE, dropless.counts_SE)


def test_expert_choice_gives_every_expert_its_share() -> None:
    layer = make_layer(router="expert_choice", num_experts=4, top_k=2)
    scale_index_L = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 4, 9]))
    x = torch.randn(2, L, 16, requires_grad=True)
    y, statistics = layer(x, scale_index_L)
    assert statistics.counts_SE.sum(0).tolist() == [2 * L * 2 / 4] * 4
    assert statistics.dropped_S.sum() == 0
    probs = (layer.router.logits(x.view(-1, 16), scale_index_L.repeat(2))).softmax(-1)
    expected = torch.zeros(2 * L, 16)
    for e in range(4):
        for token in probs[:, e].argsort(descending=True)[:L].tolist():
            hidden = F.gelu(
                layer.experts.fc1_weight[e] @ x.view(-1, 16)[token] + layer.experts.fc1_bias[e], approximate="tanh"
            )
            expected[token] += probs[token, e] * (layer.experts.fc2_weight[e] @ hidden + layer.experts.fc2_bias[e])
    assert layer.shared is not None
    torch.testing.assert_close(y.view(-1, 16), expected + layer.shared(x).view(-1, 16), atol=1e-5, rtol=1e-5)


def test_bias_balances_without_touching_the_weights() -> None:
    """Loss-free balancing evens a skewed load out by steps, and leaves S as the weight."""
    layer = make_layer(num_experts=4, top_k=1, bias_rate=0.02, shared_expert=False)
    router: Any = layer.router
    router.scale_logits_SE.data.zero_()
    router.scale_logits_SE.data[:, 1] = 1.0
    scale_index_L = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 4, 9]))
    x = torch.randn(64, L, 16, generator=torch.Generator().manual_seed(0))

    def worst_load() -> float:
        _, statistics = layer(x, scale_index_L)
        counts_E = statistics.counts_SE.sum(0)
        layer.router.update_bias(counts_E)
        return (counts_E.max() / counts_E.mean()).item()

    before = worst_load()
    for _ in range(100):
        after = worst_load()
    assert before > 1.5
    assert after < 1.1
    routing = layer.router(x.view(-1, 16), scale_index_L.repeat(64))
    torch.testing.assert_close(routing.weight_TK, routing.probs_TE.gather(1, routing.expert_index_TK))
