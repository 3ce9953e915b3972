"""Activation checkpointing: the backward pass computes activations again that the forward pass did not keep.

Routing is decided once, in the forward pass. A recomputed router could round differently and send a token to another
expert, and a capacity limit could drop another token; so the results of every top-k and every sort are kept in all
modes. Routing statistics come from the forward pass alone: those of a recomputation are discarded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import mepa_ds.models.moe.expert_loop  # noqa: F401  registers the operator mepa_ds::expert_loop

Recompute = Literal["none", "selective", "blocks"]

_aten = torch.ops.aten
_DECISIONS = [_aten.topk.default, _aten.sort.stable]
# These take the most time to compute. To recompute the norms, gates and GELUs between them saves most of the memory.
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
    """Returns block(*arguments), and keeps for the backward pass what `recompute` says.

    "none" keeps everything; "selective" keeps matrix products, attention and routing; "blocks" keeps only the inputs of
    the block and its routing.
    """
    if recompute == "none" or not torch.is_grad_enabled():
        return block(*arguments)
    contexts = partial(create_selective_checkpoint_contexts, _KEPT[recompute])
    # Blocks draw no random numbers (stochastic depth is an argument), so no generator's state is saved.
    return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
