"""Starting a run from weights on disk: fine-tuning, or the result of `mepa upcycle`."""

from __future__ import annotations

from pathlib import Path

import torch

from mepa_ds import distributed
from mepa_ds.config.model import ModelConfig
from mepa_ds.engine.fragments import parameter_layout
from mepa_ds.errors import UserError
from mepa_ds.models.moe.routing import Router
from mepa_ds.models.transformer import KIND, NextScaleTransformer
from mepa_ds.models.upcycling import NO_BIAS_AFTER_UPCYCLING, is_fresh_from_upcycling
from mepa_ds.models.var_checkpoint import convert_var
from mepa_ds.weights import read_pretrained


def load_initial_weights(transformer: NextScaleTransformer, path: Path) -> None:
    """Fills the transformer, whose experts may be sharded over ranks. Collective.

    path: a directory of safetensors + config.json, or a file of VAR's transformer such as var_d16.pth.

    Raises UserError, on every rank, for weights of another architecture: names the parameters and both shapes, and
    keys of the two configs by which the same weights would give another output.
    """
    error: UserError | None = None
    try:
        _fill(transformer, path)
    except UserError as raised:
        error = raised
    distributed.agree(error)


def _function(config: ModelConfig) -> dict[str, object]:
    """Keys that decide what the weights compute, and that no shape shows."""
    values: dict[str, object] = {"num_heads": config.H, "qk_norm": config.qk_norm, "scales": config.scales}
    if config.moe is not None:
        values |= {f"moe.{key}": getattr(config.moe, key) for key in ("router", "top_k", "renormalize")}
    return values


@torch.no_grad()
def _fill(transformer: NextScaleTransformer, path: Path) -> None:
    if path.is_dir():
        config, state = read_pretrained(path, ModelConfig, KIND)
    else:
        config, state = convert_var(path, transformer.config.scales)
    layout = parameter_layout(transformer)
    theirs = _function(config)
    faults = [
        f"model.{key}: {theirs[key]} there, {value} in the recipe"
        for key, value in _function(transformer.config).items()
        if theirs.get(key, value) != value
    ]
    faults += [
        f"{name}: not in the model" for name in state if name not in layout and not name.endswith("bias_steps_E")
    ]
    for name, (shape, _) in layout.items():
        found = tuple(state[name].shape) if name in state else None
        if found != tuple(shape):
            faults.append(f"{name}: {found or 'missing'} there, {tuple(shape)} in the recipe's model")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"init_weights: {path} does not fit the recipe's model: {'; '.join(faults[:3])}{more}")
    for name, parameter in transformer.named_parameters():
        offset = layout[name][1]
        own = state[name].reshape(-1)[offset : offset + parameter.numel()]
        parameter.copy_(own.view(parameter.shape))
    for module in transformer.modules():
        if isinstance(module, Router) and module.bias_rate and is_fresh_from_upcycling(module):
            raise UserError(f"init_weights: {path}: model.moe.bias_rate {module.bias_rate}: {NO_BIAS_AFTER_UPCYCLING}")
    for name, buffer in transformer.named_buffers():  # the steps of loss-free balancing, where both models have them
        if name in state:
            buffer.copy_(state[name])
