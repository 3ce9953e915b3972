"""AdamW in DeepSpeed's parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split_expert_groups
from torch import nn

from mepa_ds.config.optim import OptimConfig

# VAR's list in our names: embeddings of start, position and scale, AdaLN offsets, temperatures.
NO_DECAY = ("start_embed", "position_embed", "scale_embed", "adaln_offset", "log_temperature", "scale_logits_SE")


def has_decay(name: str, parameter: nn.Parameter) -> bool:
    """Applies VAR's rule: matrices decay; biases (stacked ones too), vectors and the listed embeddings do not."""
    return not (parameter.ndim < 2 or name.endswith("bias") or any(part in NO_DECAY for part in name.split(".")))


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Builds AdamW with groups for decay and no decay. Experts that are sharded over ranks get separate groups."""
    decay = [p for n, p in model.named_parameters() if has_decay(n, p)]
    no_decay = [p for n, p in model.named_parameters() if not has_decay(n, p)]
    named: list[dict[str, Any]] = [
        {"params": decay, "name": "decay", "weight_decay": config.weight_decay},
        {"params": no_decay, "name": "no_decay", "weight_decay": 0.0},
    ]
    groups = [group for group in split_expert_groups(named) if group["params"]]
    return torch.optim.AdamW(groups, lr=config.base_lr, betas=config.betas, eps=config.eps)
