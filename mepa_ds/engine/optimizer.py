"""AdamW in DeepSpeed's parameter groups."""

from __future__ import annotations

from typing import Any

from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split_expert_groups
from torch import nn

from mepa_ds.config.optim import PretrainOptimConfig
from mepa_ds.engine.starting.lean_start import AdamW
from mepa_ds.models.adapting.freezing import is_frozen
from mepa_ds.models.parametrisation import lr_factor, width_multiplier

# VAR's list in our names: embeddings of start, position and scale, AdaLN offsets, temperatures.
NO_DECAY = ("start_embed", "position_embed", "scale_embed", "adaln_offset", "log_temperature", "scale_logits_SE")


def has_decay(name: str, parameter: nn.Parameter) -> bool:
    """Applies VAR's rule: matrices decay; biases (stacked ones too), vectors and the listed embeddings do not."""
    return not (parameter.ndim < 2 or name.endswith("bias") or any(part in NO_DECAY for part in name.split(".")))


def build_optimizer(model: nn.Module, config: PretrainOptimConfig, width: int) -> AdamW:
    """Builds AdamW with groups of weights that share decay and rate. Experts that are sharded get separate groups.

    It is PyTorch's fused one, which goes over gradient, master and moments once and needs no memory of its own.

    The rate of a group is `lr_scale` times the schedule's; it is 1 unless muP scales rates with the model's `width`,
    and 0 for what is frozen.
    """
    m = width_multiplier(width, config.mup_base_width)
    members: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kind = (False, 0.0) if is_frozen(parameter) else (has_decay(name, parameter), lr_factor(name, m))
        members.setdefault(kind, []).append(parameter)
    named: list[dict[str, Any]] = [
        {
            "params": members[decays, scale],
            "name": f"{'decay' if decays else 'no_decay'} x {scale:g}",
            "weight_decay": config.weight_decay / scale if decays else 0.0,
            "lr_scale": scale,
        }
        for decays, scale in sorted(members, reverse=True)
    ]
    groups = [group for group in split_expert_groups(named) if group["params"]]
    return AdamW(groups, lr=config.base_lr, betas=config.betas, eps=config.eps, fused=True)
