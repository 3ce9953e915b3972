"""Dispatch: bring every routed token to its expert and the result back (D4, dropless).

Shapes: T tokens, K choices a token, R = T K routed rows, C width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mepa_ds.models.moe.experts import Experts
from mepa_ds.models.moe.routing import Routing

Alongside = Callable[[], Tensor]


class _WeightedSum(torch.autograd.Function):
    """sum_K weight_TK y_TKC in fp32, one choice at a time: an einsum would first make an fp32 copy of all of y."""

    @staticmethod
    def forward(ctx: Any, y_TKC: Tensor, weight_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_TKC, weight_TK)
        out_TC = y_TKC[:, 0] * weight_TK[:, 0, None]
        for k in range(1, y_TKC.shape[1]):
            out_TC.addcmul_(y_TKC[:, k].to(out_TC.dtype), weight_TK[:, k, None])
        return out_TC

    @staticmethod
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y_TKC, weight_TK = ctx.saved_tensors
        grad_y_TKC, grad_weight_TK = torch.empty_like(y_TKC), torch.empty_like(weight_TK)
        for k in range(y_TKC.shape[1]):
            torch.mul(grad_TC, weight_TK[:, k, None], out=grad_y_TKC[:, k])
            torch.linalg.vecdot(grad_TC, y_TKC[:, k].to(grad_TC.dtype), out=grad_weight_TK[:, k])
        return grad_y_TKC, grad_weight_TK


class Dispatcher(Protocol):
    """Anything that applies experts to routed tokens; the model does not know whether ranks are involved."""

    def __call__(self, x_TC: Tensor, routing: Routing, experts: Experts, alongside: Alongside | None) -> Tensor:
        """(T, C) -> (T, C) fp32: alongside() + sum over choices of weight x expert(x).

        `alongside` is work on the same tokens that needs no routing (the shared expert): a dispatcher that has to wait
        for rows to travel runs it meanwhile.
        """
        ...


class Sorted:
    """Routed rows in order of expert, and the way back.

    `x_RC` are the tokens' rows grouped by expert; `counts_E` how many each expert has.
    """

    def __init__(self, x_TC: Tensor, routing: Routing, num_experts: int):
        self._routing = routing
        expert_R = routing.expert_index_TK.reshape(-1)
        if routing.kept_TK is not None:
            # Dropped choices sort behind the last expert and are cut off.
            expert_R = expert_R.masked_fill(~routing.kept_TK.reshape(-1), num_experts)
        # A stable sort keeps tokens in order within an expert: the same sums on every layout.
        sorted_R, self._order_R = expert_R.sort(stable=True)
        bounds = torch.arange(num_experts + 1, device=expert_R.device, dtype=expert_R.dtype)
        self.counts_E = torch.searchsorted(sorted_R, bounds).diff()
        if routing.kept_TK is not None:
            self._order_R = self._order_R[: int(self.counts_E.sum())]
        num_choices = routing.expert_index_TK.shape[1]
        self._token_R = self._order_R.div(num_choices, rounding_mode="floor")
        self.x_RC = x_TC.index_select(0, self._token_R)

    def combine(self, y_RC: Tensor) -> Tensor:
        """Experts' outputs in sorted order -> (T, C) fp32, weighted and summed over each token's choices."""
        num_tokens, num_choices = self._routing.weight_TK.shape
        weight_R = self._routing.weight_TK.reshape(-1)
        if self._routing.kept_TK is None:
            place_R = torch.empty_like(self._order_R)
            place_R[self._order_R] = torch.arange(len(place_R), device=place_R.device)
            y_TKC = y_RC.index_select(0, place_R).view(num_tokens, num_choices, y_RC.shape[1])
            return _WeightedSum.apply(y_TKC, self._routing.weight_TK)
        weighted_RC = y_RC.float() * weight_R[self._order_R, None]
        return weighted_RC.new_zeros(num_tokens, y_RC.shape[1]).index_add(0, self._token_R, weighted_RC)


class LocalDispatcher:
    """All experts are here: sort, apply, unsort. Needs no process group."""

    def __call__(self, x_TC: Tensor, routing: Routing, experts: Experts, alongside: Alongside | None = None) -> Tensor:
        rows = Sorted(x_TC, routing, experts.num_experts)
        y_TC = rows.combine(experts(rows.x_RC, rows.counts_E))
        return y_TC if alongside is None else y_TC + alongside()
