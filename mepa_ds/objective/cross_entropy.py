"""Cross-entropy of every token, computed in fp32 without keeping logits in fp32.

Shapes: B batch, L positions, T = B L, V codebook.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24
"""Logits that are in fp32 at a time: 64 MiB, so that a GPU is busy and no chunk counts beside a model's memory."""
_CPU_CHUNK_ELEMENTS = 1 << 19
"""On a CPU, 2 MiB: a chunk stays in its cache from one operation to the next."""


def token_scores(logits_BLV: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) of each token and whether the largest logit was its own (1 or 0): both (B, L) fp32.

    Equal to `F.cross_entropy(logits.float())`. For the backward pass only the logits, in their own type, and one number
    a token are kept; PyTorch's own keeps the logits and their softmax in fp32.
    """
    ce_BL, _, hits_BL = token_losses(logits_BLV, tokens_BL, 0.0)
    return ce_BL, hits_BL


def token_losses(logits_BLV: Tensor, tokens_BL: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each token, its cross-entropy and whether the largest logit was its own: all (B, L) fp32.

    The loss is `F.cross_entropy(..., label_smoothing=...)`: of each target the share `label_smoothing` is spread evenly
    over all V codes (arXiv 1512.00567). Only the loss has a gradient.
    """
    loss_T, hits_T, ce_T = _TokenScores.apply(logits_BLV.flatten(0, -2), tokens_BL.flatten(), label_smoothing)
    ce_T = loss_T.detach() if ce_T is None else ce_T
    return loss_T.view_as(tokens_BL), ce_T.view_as(tokens_BL), hits_T.view_as(tokens_BL)


class _TokenScores(torch.autograd.Function):
    """loss_t = logsumexp(logits_t) - sum over v of target_tv logits_tv; its gradient is softmax(logits_t) - target_t.

    target_tv is smoothing / V, and 1 - smoothing more at the token.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, tokens_T: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss, hits, and the cross-entropy where the loss is another one."""
        normaliser_T = logits_TV.new_empty(len(logits_TV), dtype=torch.float32)
        ce_T, hits_T = torch.empty_like(normaliser_T), torch.empty_like(normaliser_T)
        loss_T = torch.empty_like(normaliser_T) if smoothing else ce_T
        for part in _parts(logits_TV):
            logits, tokens = logits_TV[part].float(), tokens_T[part]
            torch.logsumexp(logits, dim=-1, out=normaliser_T[part])
            ce_T[part] = normaliser_T[part] - logits.gather(1, tokens[:, None])[:, 0]
            hits_T[part] = (logits.argmax(-1) == tokens).float()
            if smoothing:
                loss_T[part] = torch.lerp(ce_T[part], normaliser_T[part] - logits.mean(-1), smoothing)
        ctx.save_for_backward(logits_TV, tokens_T, normaliser_T)
        ctx.smoothing = smoothing
        if not smoothing:
            ctx.mark_non_differentiable(hits_T)
            return loss_T, hits_T, None
        ctx.mark_non_differentiable(hits_T, ce_T)
        return loss_T, hits_T, ce_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits_TV, tokens_T, normaliser_T = ctx.saved_tensors
        grad_TV = torch.empty_like(logits_TV)
        for part in _parts(logits_TV):
            grad = (logits_TV[part].float() - normaliser_T[part, None]).exp_()
            grad.scatter_add_(1, tokens_T[part, None], grad.new_full((len(grad), 1), ctx.smoothing - 1.0))
            if ctx.smoothing:
                grad -= ctx.smoothing / grad.shape[1]
            torch.mul(grad, grad_T[part, None], out=grad)
            grad_TV[part] = grad
        return grad_TV, None, None


def _parts(logits_TV: Tensor) -> Iterator[slice]:
    """Slices of rows whose logits together are one chunk."""
    elements = _CPU_CHUNK_ELEMENTS if logits_TV.device.type == "cpu" else _CHUNK_ELEMENTS
    rows = max(elements // logits_TV.shape[1], 1)
    return (slice(start, start + rows) for start in range(0, len(logits_TV), rows))
