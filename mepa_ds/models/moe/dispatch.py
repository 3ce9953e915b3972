"""Dispatch: bring every routed token to its expert and the result back (docs/decisions.md, Dropless routing).

Shapes: T tokens, K choices a token, R = T K routed rows, C width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mepa_ds.models.moe.experts import Experts
from mepa_ds.models.moe.routing import Routing

Alongside = Callable[[Tensor], Tensor]


class Dispatcher(Protocol):
    """Anything that applies experts to routed tokens; the model does not know whether ranks are involved."""

    def __call__(self, x_TC: Tensor, routing: Routing, experts: Experts, alongside: Alongside | None) -> Tensor:
        """(T, C) -> (T, C) fp32: alongside(x) + sum over choices of weight x expert(x).

        `alongside` is work on each token that needs no routing (the shared expert): a dispatcher that has to wait for
        rows to travel runs it meanwhile, on some of the tokens at a time if it likes.
        """
        ...


class Sorted:
    """Routed rows in order of expert, and the way back. `counts_E` says how many rows each expert has."""

    def __init__(self, x_TC: Tensor, routing: Routing, num_experts: int):
        num_choices = routing.expert_index_TK.shape[1]
        expert_R = routing.expert_index_TK.reshape(-1)
        if routing.kept_TK is not None:
            # Dropped choices sort behind the last expert and are cut off.
            expert_R = expert_R.masked_fill(~routing.kept_TK.reshape(-1), num_experts)
        # A stable sort keeps tokens in order within an expert: the same sums on every layout.
        sorted_R, self._order_R = expert_R.sort(stable=True)
        bounds = torch.arange(num_experts + 1, device=expert_R.device, dtype=expert_R.dtype)
        self.counts_E = torch.searchsorted(sorted_R, bounds).diff()
        self.drops_some = routing.kept_TK is not None
        self._token_R = self._order_R.div(num_choices, rounding_mode="floor")
        self._x_TC = x_TC
        self._weight_TK = routing.weight_TK

    def rows(self, num_kept: int | None = None) -> Tensor:
        """(R, C): the tokens' rows grouped by expert. `num_kept`, the sum of counts_E, is needed if `drops_some`."""
        if self.drops_some:
            assert num_kept is not None
            self._order_R, self._token_R = self._order_R[:num_kept], self._token_R[:num_kept]
            return self._x_TC.index_select(0, self._token_R)
        self._place_TK = inverse(self._order_R).view_as(self._weight_TK)
        return Spread.apply(self._x_TC, self._token_R, self._place_TK)

    def combine(self, y_RC: Tensor) -> Tensor:
        """Experts' outputs in sorted order -> (T, C) fp32, weighted and summed over each token's choices."""
        if not self.drops_some:
            return _Combine.apply(y_RC, self._weight_TK, self._order_R, self._place_TK)
        weighted_RC = y_RC.float() * self._weight_TK.reshape(-1)[self._order_R, None]
        out_TC = weighted_RC.new_zeros(len(self._weight_TK), y_RC.shape[1])
        return out_TC.index_add(0, self._token_R, weighted_RC)


def inverse(order_R: Tensor) -> Tensor:
    """The permutation that undoes `order_R`."""
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return place_R


class Spread(torch.autograd.Function):
    """Each token's row once for each of its choices, in order of expert (with one choice, a permutation).

    The gradient gathers instead of scattering.
    """

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, token_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TC.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RC: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (place_TK,) = ctx.saved_tensors
        return _weighted_sums(grad_RC, place_TK), None, None


class _Combine(torch.autograd.Function):
    """out_t = sum_k weight_tk y_(place_tk), products and sums in fp32 both ways, whatever the type of y."""

    @staticmethod
    def forward(ctx: Any, y_RC: Tensor, weight_TK: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_RC, weight_TK, order_R, place_TK)
        return _weighted_sums(y_RC.float(), place_TK, weight_TK)

    @staticmethod
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        y_RC, weight_TK, order_R, place_TK = ctx.saved_tensors
        num_choices, first_T = place_TK.shape[1], torch.arange(len(place_TK), device=place_TK.device)
        grad_TC = grad_TC.contiguous()
        # <grad_t, y_(place_tk)>: the operator that PyTorch's own gradient of an embedding bag's weights calls.
        grad_weight_R = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_TC, y_RC.float(), place_TK.flatten(), first_T * num_choices, first_T.repeat_interleave(num_choices), 0
        )
        token_R1 = order_R.div(num_choices, rounding_mode="floor")[:, None]
        grad_RC = _weighted_sums(grad_TC, token_R1, weight_TK.flatten()[order_R, None])
        return grad_RC.to(y_RC.dtype), grad_weight_R.view_as(weight_TK), None, None


def _weighted_sums(rows: Tensor, index_NK: Tensor, weight_NK: Tensor | None = None) -> Tensor:
    """(N, C): sum_k weight_nk rows[index_nk], weights 1 if there are none.

    PyTorch's embedding bag is one pass through memory, in which each row is read where it lies and sums are fp32.
    """
    return F.embedding_bag(index_NK, rows.contiguous(), mode="sum", per_sample_weights=weight_NK)


class LocalDispatcher:
    """All experts are here: sort, apply, unsort. Needs no process group."""

    def __call__(self, x_TC: Tensor, routing: Routing, experts: Experts, alongside: Alongside | None = None) -> Tensor:
        by_expert = Sorted(x_TC, routing, experts.num_experts)
        counts = by_expert.counts_E.tolist() if by_expert.drops_some else None
        x_RC = by_expert.rows(None if counts is None else sum(counts))
        y_TC = by_expert.combine(experts(x_RC, by_expert.counts_E, counts))
        return y_TC if alongside is None else y_TC + alongside(x_TC)
