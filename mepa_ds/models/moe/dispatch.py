"""Dispatch: the permutation that brings each routed token to its experts, and the way back (docs/decisions.md, Dropless
routing).

Shapes: T tokens, K choices a token, R routed rows (T K, less those that are dropped), C width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mepa_ds.models.moe.experts import Experts
from mepa_ds.models.moe.routing import Routing

SharedExpert = Callable[[Tensor], Tensor]
"""(T, C) -> (T, C), token by token."""


class Dispatcher(Protocol):
    """Applies experts to routed tokens. The model does not know whether the experts are on this rank or on others."""

    def __call__(self, x_TC: Tensor, routing: Routing, experts: Experts, shared_expert: SharedExpert | None) -> Tensor:
        """(T, C) -> (T, C) in fp32: shared_expert(x) + the sum over a token's choices of weight x expert(x).

        The shared expert needs no routing. A dispatcher that waits for rows to travel between ranks computes it in the
        meantime (shared-expert overlap), and may pass it a part of the tokens at a time.
        """
        ...


class TokenPermutation:
    """The permutation that sorts routed (token, choice) pairs by expert, and its inverse.

    `counts_E` holds the number of rows of each expert.
    """

    def __init__(self, x_TC: Tensor, routing: Routing, num_experts: int):
        num_choices = routing.expert_index_TK.shape[1]
        # Two bytes are enough for an expert's number, and a GPU sorts by as many digits as a key has.
        expert_R = routing.expert_index_TK.reshape(-1).to(torch.int16)
        if routing.kept_TK is not None:
            # Dropped choices are sorted behind the last expert, and `permute` cuts them off.
            expert_R = expert_R.masked_fill(~routing.kept_TK.reshape(-1), num_experts)
        # The sort is stable: tokens keep their order within an expert, so that sums are the same on every layout.
        sorted_R, self._order_R = expert_R.sort(stable=True)
        bounds = torch.arange(num_experts + 1, device=expert_R.device, dtype=expert_R.dtype)
        self.counts_E = torch.searchsorted(sorted_R, bounds).diff()
        self.drops_some = routing.kept_TK is not None
        self._token_R = self._order_R.div(num_choices, rounding_mode="floor")
        self._x_TC = x_TC
        self._weight_TK = routing.weight_TK

    def permute(self, num_kept: int | None = None) -> Tensor:
        """The tokens' rows, sorted by expert: (R, C).

        `num_kept` is the sum of counts_E on the host. It is needed if `drops_some`.
        """
        if self.drops_some:
            assert num_kept is not None
            self._order_R, self._token_R = self._order_R[:num_kept], self._token_R[:num_kept]
            return self._x_TC.index_select(0, self._token_R)
        self._place_TK = inverse_permutation(self._order_R).view_as(self._weight_TK)
        return Permute.apply(self._x_TC, self._token_R, self._place_TK)

    def unpermute(self, y_RC: Tensor) -> Tensor:
        """The weighted sum over each token's choices: outputs (R, C), sorted by expert -> (T, C) in fp32."""
        if not self.drops_some:
            return _Unpermute.apply(y_RC, self._weight_TK, self._order_R, self._place_TK)
        weighted_RC = y_RC.float() * self._weight_TK.reshape(-1)[self._order_R, None]
        out_TC = weighted_RC.new_zeros(len(self._weight_TK), y_RC.shape[1])
        return out_TC.index_add(0, self._token_R, weighted_RC)


def inverse_permutation(order_R: Tensor) -> Tensor:
    """The permutation that undoes `order_R`: (R,) -> (R,)."""
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return place_R


class Permute(torch.autograd.Function):
    """Takes each token's row once for each of its choices, in order of expert: (T, C) -> (R, C).

    With one choice a token this is a permutation of rows. The gradient gathers rows instead of scattering them.
    """

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, token_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TC.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RC: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (place_TK,) = ctx.saved_tensors
        return _weighted_sums(grad_RC, place_TK), None, None


class _Unpermute(torch.autograd.Function):
    """out_t = sum_k weight_tk y_(place_tk): (R, C) -> (T, C).

    Products and sums are fp32 in the forward and in the backward pass, whatever the type of y.
    """

    @staticmethod
    def forward(ctx: Any, y_RC: Tensor, weight_TK: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_RC, weight_TK, order_R, place_TK)
        return _weighted_sums(y_RC.float(), place_TK, weight_TK)

    @staticmethod
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        y_RC, weight_TK, order_R, place_TK = ctx.saved_tensors
        num_choices, first_T = place_TK.shape[1], torch.arange(len(place_TK), device=place_TK.device)
        grad_TC = grad_TC.contiguous()
        # <grad_t, y_(place_tk)>, by the operator that PyTorch calls for the gradient of an embedding bag's weights.
        grad_weight_R = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_TC, y_RC.float(), place_TK.flatten(), first_T * num_choices, first_T.repeat_interleave(num_choices), 0
        )
        token_R1 = order_R.div(num_choices, rounding_mode="floor")[:, None]
        grad_RC = _weighted_sums(grad_TC, token_R1, weight_TK.flatten()[order_R, None])
        return grad_RC.to(y_RC.dtype), grad_weight_R.view_as(weight_TK), None, None


def _weighted_sums(rows: Tensor, index_NK: Tensor, weight_NK: Tensor | None = None) -> Tensor:
    """sum_k weight_nk rows[index_nk]: (N, C). Without weights, all weights are 1.

    PyTorch's embedding bag does this in one pass through memory: it reads each row in place and sums in fp32.
    """
    return F.embedding_bag(index_NK, rows.contiguous(), mode="sum", per_sample_weights=weight_NK)


class LocalDispatcher:
    """Dispatches in one process, which holds all experts: permute, apply, unpermute. It needs no process group."""

    def __call__(
        self, x_TC: Tensor, routing: Routing, experts: Experts, shared_expert: SharedExpert | None = None
    ) -> Tensor:
        permutation = TokenPermutation(x_TC, routing, experts.num_experts)
        counts = permutation.counts_E.tolist() if permutation.drops_some else None
        x_RC = permutation.permute(None if counts is None else sum(counts))
        y_TC = permutation.unpermute(experts(x_RC, permutation.counts_E, counts))
        return y_TC if shared_expert is None else y_TC + shared_expert(x_TC)
