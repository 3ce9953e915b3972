"""Starts a run from weights on disk, for fine-tuning or from the result of `mepa upcycle`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mepa_ds import distributed
from mepa_ds.checkpoint.fragment import MASTER
from mepa_ds.config.model import ModelConfig
from mepa_ds.engine.fragments import parameter_fragments, parameter_layout
from mepa_ds.errors import UserError
from mepa_ds.log import note
from mepa_ds.models.adapting.adapt import Missing, adapt
from mepa_ds.models.moe.routing import Router
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.models.transformer_files import fitting, read_transformer
from mepa_ds.models.upcycling import NO_BIAS_AFTER_UPCYCLING, is_fresh_from_upcycling
from mepa_ds.weights.file_checks import check_finite
from mepa_ds.weights.var_sizes import GivenSizes

_UNFIT = "does not fit the recipe's model"


def load_initial_weights(transformer: NextScaleTransformer, path: Path, missing: Missing = "classes") -> None:
    """Fills the transformer, whose experts may be sharded over ranks. Collective.

    path: a directory of safetensors + config.json, or VAR's transformer such as var_d16.pth.
    missing: in what the weights may differ from the model (mepa_ds.models.adapting.adapt).

    If the weights have other classes, the embeddings of classes stay as they were drawn, but for those that have the
    same name, and all other weights are taken (also the embedding of "no class"). A line on stderr says so.

    Raises UserError, on every rank, for weights of another architecture. The message names the recipe's keys that
    differ, including keys that only change what the same weights compute, and how to start from these weights anyway.
    """
    error: UserError | None = None
    try:
        _fill(transformer, path, missing)
    except UserError as raised:
        error = UserError(f"init_weights: {raised}")
    distributed.agree(error)


class UnroundedWeights:
    """Weights as they were read, for the optimizer's fp32 masters.

    DeepSpeed makes those of what it has cast to bf16 or fp16: they would start from weights of three digits, and what
    is frozen would not be exported as it came.
    """

    def __init__(self, objective: nn.Module):
        self._weights = {name: weight.detach().to("cpu", copy=True) for name, weight in objective.named_parameters()}

    def fill(self, objective: nn.Module, masters: list[Tensor]) -> None:
        """Fills a rank's flat partitions, one per group."""
        layout = parameter_layout(objective)
        for piece in parameter_fragments(objective, {MASTER: masters}):
            name = piece.name.removeprefix(f"{MASTER}/")
            start = piece.offset - layout[name][1]
            piece.data.copy_(self._weights[name].view(-1)[start : start + piece.data.numel()])


def _architecture(config: ModelConfig) -> dict[str, object]:
    """Returns the settings that decide the shapes of the weights and what they compute, by their names in a recipe."""
    values: dict[str, object] = {
        "depth": config.depth,
        "width": config.C,
        "num_heads": config.H,
        "ffn_ratio": config.dense_hidden / config.C,
        "scales": list(config.scales),
        "codebook_size": config.codebook_size,
        "code_width": config.code_width,
        "shared_adaln": config.shared_adaln,
        "qk_norm": config.qk_norm,
        "markovian": config.markovian,
    }
    if config.moe is not None:
        if config.moe.every == 1:
            del values["ffn_ratio"]  # no FFN is dense then
        keys = ("router", "num_experts", "top_k", "renormalize", "shared_expert", "every")
        values |= {f"moe.{key}": getattr(config.moe, key) for key in keys}
        values["moe.expert_ratio"] = config.expert_hidden / config.C
    return values


def _refuse_another(theirs: ModelConfig, ours: ModelConfig, path: Path) -> None:
    """Raises UserError, with a remedy, for weights whose config differs from the recipe's."""
    if (theirs.moe is None) != (ours.moe is None):
        if ours.moe is not None:
            way = _way_to_experts(theirs, ours, path)
            raise UserError(f"{path} {_UNFIT}: it is dense, and the recipe's has experts. {way}")
        settings = _settings(_architecture(theirs), "moe.")
        raise UserError(f"{path} {_UNFIT}: it has experts, and the recipe's is dense; set {settings}")
    there, here = _architecture(theirs), _architecture(ours)
    differing = {key: there[key] for key in there if key in here and there[key] != here[key]}
    if not differing:
        return
    faults = "; ".join(f"model.{key}: {value} there, {here[key]} in the recipe" for key, value in differing.items())
    way = f"To start from these weights, set {_settings(differing)}"
    if "scales" in differing:
        sides = " ".join(map(str, theirs.scales))
        way += (
            f", and use tokens of these scales (mepa data precompute tokens IMAGES --scales {sides} ...); or set "
            "init_missing=scales, which resamples the embeddings of positions and scales"
        )
    raise UserError(f"{path} {_UNFIT}: {faults}. {way}")


def _settings(values: Mapping[str, object], prefix: str = "") -> str:
    """Returns the values whose keys start with `prefix`, as overrides for the command line."""
    chosen = {key: value for key, value in values.items() if key.startswith(prefix)}
    texts = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in chosen.items()}
    return " ".join(f"model.{key}={text.replace(' ', '')}" for key, text in texts.items())


def _way_to_experts(theirs: ModelConfig, ours: ModelConfig, path: Path) -> str:
    """Returns advice: `mepa upcycle` with the recipe's experts, and the changes that the recipe then needs."""
    moe = ours.moe
    assert moe is not None
    if moe.router == "expert_choice":
        return "With model.moe.router=expert_choice it cannot be upcycled; use another router, or model.moe=null"
    ratio = min(moe.expert_ratio, theirs.ffn_ratio)
    words: list[Any] = ["mepa", "upcycle", "--weights", path, "--out", "OUT", "--num-experts", moe.num_experts]
    words += ["--top-k", moe.top_k, "--expert-ratio", ratio, "--router", moe.router, "--every", moe.every]
    words += ["--renormalize"] if moe.renormalize else []
    words += [] if moe.shared_expert else ["--no-shared-expert"]
    if not path.is_dir():  # settings that the file may not tell
        words += ["--scales", *theirs.scales, "--num-heads", theirs.H, "--depth", theirs.depth]
    changes = ["init_weights=OUT"]
    if moe.bias_rate:
        changes.append("model.moe.bias_rate=0")
    if ratio != moe.expert_ratio:
        changes.append(f"model.moe.expert_ratio={ratio}")
    return (
        f"Make a mixture of it, with\n  {shlex.join(map(str, words))}\n  and set {' '.join(changes)}; or train it "
        "dense, with model.moe=null. init_missing=all makes one without a file of its own"
    )


@torch.no_grad()
def _fill(transformer: NextScaleTransformer, path: Path, missing: Missing) -> None:
    ours = transformer.config
    stored = read_transformer(path, GivenSizes(ours.scales, ours.num_heads, ours.depth, missing != "classes"))
    fitting(lambda: NextScaleTransformer(stored.config), stored.state, str(path), stored.name_in_file)
    check_finite(stored.state, str(path))
    try:
        adapted = adapt(
            stored.config, stored.state, stored.class_names, ours, transformer.class_names, missing,
            lambda: transformer.class_embed.weight.detach().clone(),
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    state = adapted.state
    _refuse_another(adapted.config, ours, path)
    if distributed.is_main():
        for line in adapted.notes:
            note(f"init_weights: {path} {line}")
    layout = parameter_layout(transformer)
    for name, parameter in transformer.named_parameters():
        shape, offset = layout[name]
        assert state[name].shape == shape, name
        own = state[name].reshape(-1)[offset : offset + parameter.numel()]
        parameter.copy_(own.view(parameter.shape))
    for module in transformer.modules():
        if isinstance(module, Router) and module.bias_rate and is_fresh_from_upcycling(module):
            raise UserError(f"{path}: model.moe.bias_rate {module.bias_rate}: {NO_BIAS_AFTER_UPCYCLING}")
    for name, buffer in transformer.named_buffers():  # the steps of loss-free balancing, if both models have them
        if name in state:
            buffer.copy_(state[name])
