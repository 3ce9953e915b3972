"""Activation checkpointing: what the backward pass computes again instead of keeping.

Routing is never decided twice. A recomputed router could round differently and send a token elsewhere than in the
forward pass, or a capacity limit drop another; so the results of every top-k and every sort are kept, whatever else is
not. (Statistics come from the forward pass alone: those of a recomputation are thrown away with its other outputs.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import mepa_ds.models.moe.experts  # noqa: F401 registers mepa_ds::expert_loop

Recompute = Literal["none", "selective", "blocks"]

_aten = torch.ops.aten
_DECISIONS = [_aten.topk.default, _aten.sort.stable]
# Dear to compute, and with the norms, gates and GELUs between them recomputed, most of the memory is saved already.
_PRODUCTS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._grouped_mm.default,
    torch.ops.mepa_ds.expert_loop.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
]
_KEPT = {"blocks": _DECISIONS, "selective": _DECISIONS + _PRODUCTS}


def run_block(block: Callable[..., Any], arguments: tuple[Any, ...], recompute: Recompute) -> Any:
    """block(*arguments), keeping for the backward pass: everything ("none"), matrix products, attention and routing
    ("selective"), or the block's input and routing alone ("blocks").
    """
    if recompute == "none" or not torch.is_grad_enabled():
        return block(*arguments)
    contexts = partial(create_selective_checkpoint_contexts, _KEPT[recompute])
    # No generator is used inside (stochastic depth comes in as an argument), so none is saved.
    return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
