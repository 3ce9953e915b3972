"""Dispatch: bring every routed token to its expert and the result back (D4, dropless).

Shapes: T tokens, K choices a token, R = T K routed rows, C width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from mepa_ds.models.moe.experts import Experts
from mepa_ds.models.moe.routing import Routing

Alongside = Callable[[Tensor], Tensor]
_CACHED_ELEMENTS = 1 << 17


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
        grad_TC = grad_RC.new_empty(len(place_TK), grad_RC.shape[1])
        for block in _blocks(grad_TC):
            torch.index_select(grad_RC, 0, place_TK[block, 0], out=grad_TC[block])
            for k in range(1, place_TK.shape[1]):
                grad_TC[block] += grad_RC.index_select(0, place_TK[block, k])
        return grad_TC, None, None


class _Combine(torch.autograd.Function):
    """out_t = sum_k weight_tk y_(place_tk), products and sums in fp32 both ways, whatever the type of y.

    One choice (on a CPU, one block of tokens) at a time, so no fp32 copy of all rows is made.
    """

    @staticmethod
    def forward(ctx: Any, y_RC: Tensor, weight_TK: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_RC, weight_TK, order_R, place_TK)
        out_TC = y_RC.index_select(0, place_TK[:, 0]).float().mul_(weight_TK[:, 0, None])
        for k in range(1, place_TK.shape[1]):
            out_TC.addcmul_(y_RC.index_select(0, place_TK[:, k]).float(), weight_TK[:, k, None])
        return out_TC

    @staticmethod
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        y_RC, weight_TK, order_R, place_TK = ctx.saved_tensors
        grad_weight_TK = torch.empty_like(weight_TK)
        grad_TKC = y_RC.new_empty(*place_TK.shape, y_RC.shape[1])
        for block in _blocks(grad_TC):
            for k in range(place_TK.shape[1]):
                y_TC = y_RC.index_select(0, place_TK[block, k]).float()
                grad_weight_TK[block, k] = y_TC.mul_(grad_TC[block]).sum(-1)
                grad_TKC[block, k] = torch.mul(grad_TC[block], weight_TK[block, k, None], out=y_TC)
        return grad_TKC.view_as(y_RC).index_select(0, order_R), grad_weight_TK, None, None


def _blocks(x_TC: Tensor) -> Iterator[slice]:
    """Of tokens: on a CPU as many as its cache holds with what is made of them (a third of the time); all on a GPU."""
    num_tokens, width = x_TC.shape
    size = max(1, _CACHED_ELEMENTS // width) if x_TC.device.type == "cpu" else max(1, num_tokens)
    return (slice(start, start + size) for start in range(0, num_tokens, size))


class LocalDispatcher:
    """All experts are here: sort, apply, unsort. Needs no process group."""

    def __call__(self, x_TC: Tensor, routing: Routing, experts: Experts, alongside: Alongside | None = None) -> Tensor:
        by_expert = Sorted(x_TC, routing, experts.num_experts)
        counts = by_expert.counts_E.tolist() if by_expert.drops_some else None
        x_RC = by_expert.rows(None if counts is None else sum(counts))
        y_TC = by_expert.combine(experts(x_RC, by_expert.counts_E, counts))
        return y_TC if alongside is None else y_TC + alongside(x_TC)
