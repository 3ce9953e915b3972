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
        num_tokens, num_choices = routing.expert_index_TK.shape
        expert_R = routing.expert_index_TK.reshape(-1)
        if routing.kept_TK is not None:
            # Dropped choices sort behind the last expert and are cut off.
            expert_R = expert_R.masked_fill(~routing.kept_TK.reshape(-1), num_experts)
        # A stable sort keeps tokens in order within an expert: the same sums on every layout.
        sorted_R, order_R = expert_R.sort(stable=True)
        bounds = torch.arange(num_experts + 1, device=expert_R.device, dtype=expert_R.dtype)
        self.counts_E = torch.searchsorted(sorted_R, bounds).diff()
        self._weight_TK = routing.weight_TK
        self._place_TK: Tensor | None = None
        if routing.kept_TK is None:
            place_R = torch.empty_like(order_R)
            place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
            self._place_TK = place_R.view(num_tokens, num_choices)
        else:
            order_R = order_R[: int(self.counts_E.sum())]
        self._order_R = order_R
        self._token_R = order_R.div(num_choices, rounding_mode="floor")
        if self._place_TK is None:
            self.x_RC = x_TC.index_select(0, self._token_R)
        else:
            self.x_RC = _Spread.apply(x_TC, self._token_R, self._place_TK)

    def combine(self, y_RC: Tensor) -> Tensor:
        """Experts' outputs in sorted order -> (T, C) fp32, weighted and summed over each token's choices."""
        if self._place_TK is not None:
            return _Combine.apply(y_RC, self._weight_TK, self._order_R, self._token_R, self._place_TK)
        weighted_RC = y_RC.float() * self._weight_TK.reshape(-1)[self._order_R, None]
        out_TC = weighted_RC.new_zeros(len(self._weight_TK), y_RC.shape[1])
        return out_TC.index_add(0, self._token_R, weighted_RC)


class _Spread(torch.autograd.Function):
    """Each token's row once for each of its choices, in order of expert. The gradient gathers instead of scattering."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, token_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TC.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RC: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (place_TK,) = ctx.saved_tensors
        grad_TC = grad_RC.index_select(0, place_TK[:, 0])
        for k in range(1, place_TK.shape[1]):
            grad_TC += grad_RC.index_select(0, place_TK[:, k])
        return grad_TC, None, None


class _Combine(torch.autograd.Function):
    """out_t = sum_k weight_tk y_(place_tk) in fp32; one choice at a time, so no fp32 copy of all rows is made."""

    @staticmethod
    def forward(
        ctx: Any, y_RC: Tensor, weight_TK: Tensor, order_R: Tensor, token_R: Tensor, place_TK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_RC, weight_TK, order_R, token_R)
        out_TC = y_RC.index_select(0, place_TK[:, 0]).float().mul_(weight_TK[:, 0, None])
        for k in range(1, place_TK.shape[1]):
            out_TC.addcmul_(y_RC.index_select(0, place_TK[:, k]).float(), weight_TK[:, k, None])
        return out_TC

    @staticmethod
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        y_RC, weight_TK, order_R, token_R = ctx.saved_tensors
        grad_RC = grad_TC.to(y_RC.dtype).index_select(0, token_R)
        grad_weight_TK = torch.empty_like(weight_TK)
        grad_weight_TK.view(-1)[order_R] = (grad_RC * y_RC).sum(-1).to(weight_TK.dtype)
        grad_RC *= weight_TK.reshape(-1)[order_R, None].to(y_RC.dtype)
        return grad_RC, grad_weight_TK, None, None, None


class LocalDispatcher:
    """All experts are here: sort, apply, unsort. Needs no process group."""

    def __call__(self, x_TC: Tensor, routing: Routing, experts: Experts, alongside: Alongside | None = None) -> Tensor:
        rows = Sorted(x_TC, routing, experts.num_experts)
        y_TC = rows.combine(experts(rows.x_RC, rows.counts_E))
        return y_TC if alongside is None else y_TC + alongside()
