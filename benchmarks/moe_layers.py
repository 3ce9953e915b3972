"""The layers that benchmarks/moe.py compares: each routes by logits that it is given.

Shapes: T tokens, K = TOP_K choices a token, C width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mepa_ds.models.moe.dispatch import Dispatcher
from mepa_ds.models.moe.expert_loop import looped_experts
from mepa_ds.models.moe.experts import Experts, grouped_experts
from mepa_ds.models.moe.routing import Routing

TOP_K = 2
Layer = Callable[[Tensor, Tensor], Tensor]
"""(T, C) tokens and (T, E) logits -> (T, C)."""


class Parameters(nn.Module):
    """The weights all contenders share."""

    def __init__(self, C: int, hidden: int, E: int, dtype: torch.dtype, device: str):
        super().__init__()
        torch.manual_seed(0)
        self.experts = Experts(E, C, hidden).to(device, dtype)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.02)


def route(logits_TE: Tensor) -> Routing:
    probs_TE = logits_TE.float().softmax(-1)
    weight_TK, index_TK = probs_TE.topk(TOP_K, dim=-1)
    return Routing(logits_TE, probs_TE, index_TK, weight_TK)


def ours(parameters: Parameters, dispatcher: Dispatcher, experts: Any = None) -> Layer:
    experts = experts or parameters.experts
    return lambda x_TC, logits_TE: dispatcher(x_TC, route(logits_TE), experts, None).to(x_TC.dtype)


class OneImplementation:
    """The experts of `Parameters`, always by grouped GEMMs or always by the loop."""

    def __init__(self, experts: Experts, grouped: bool):
        self.num_experts, self._experts, self._grouped = experts.num_experts, experts, grouped

    def __call__(self, x_RC: Tensor, counts_E: Tensor, counts: list[int] | None = None) -> Tensor:
        tensors = [x_RC, *self._experts.parameters()]
        return grouped_experts(tensors, counts_E) if self._grouped else looped_experts(tensors, counts_E.tolist())


def mask_loop(parameters: Parameters) -> Layer:
    def run(x_TC: Tensor, logits_TE: Tensor) -> Tensor:
        routing, experts = route(logits_TE), parameters.experts
        flat_x = x_TC.repeat_interleave(TOP_K, dim=0)
        flat_index = routing.expert_index_TK.flatten()
        y = torch.empty_like(flat_x)
        for e in range(experts.num_experts):
            mask = flat_index == e
            hidden = F.gelu(F.linear(flat_x[mask], experts.fc1_weight[e], experts.fc1_bias[e]), approximate="tanh")
            y[mask] = F.linear(hidden, experts.fc2_weight[e], experts.fc2_bias[e])
        weighted = y.view(*routing.weight_TK.shape, -1) * routing.weight_TK[..., None].to(y.dtype)
        return weighted.sum(1)

    return run


def dense(C: int, hidden: int, dtype: torch.dtype, device: str) -> tuple[nn.Module, Layer]:
    module = nn.Sequential(nn.Linear(C, TOP_K * hidden), nn.GELU("tanh"), nn.Linear(TOP_K * hidden, C)).to(
        device, dtype
    )
    return module, lambda x_TC, _: module(x_TC)


class _DeepSpeedExpert(nn.Module):
    def __init__(self, C: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, hidden), nn.Linear(hidden, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def stock_deepspeed(C: int, hidden: int, E: int, dtype: torch.dtype, device: str) -> tuple[nn.Module, Layer] | None:
    """DeepSpeed's own layer with drop_tokens off; its gate is replaced by the given logits."""
    try:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        from deepspeed.moe.layer import MoE
        from deepspeed.moe.sharded_moe import top2gating
    except ImportError:
        return None
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    layer = MoE(
        C, _DeepSpeedExpert(C, hidden), num_experts=E, k=TOP_K, drop_tokens=False, top2_2nd_expert_sampling=False
    )
    layer.set_deepspeed_parallelism()
    layer = layer.to(device, dtype)
    gate = layer.deepspeed_moe.gate

    def run(x_TC: Tensor, logits_TE: Tensor) -> Tensor:
        def forward(x: Tensor, used: Any = None, sparse_routes: bool = False, use_tutel: bool = False) -> Any:
            """The stock gate's, but for its own matrix product; dropless, no noise on the second expert."""
            return top2gating(logits_TE, 1.0, gate.min_capacity, False, None, False, sparse_routes)

        gate.forward = forward
        return layer(x_TC)[0]

    return layer, run
