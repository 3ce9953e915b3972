"""Tokenizer and teacher in the plan of a run: width, weights, and memory when they run online.

Shapes: B images of a micro-batch, H side of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mepa_ds.config.base import load_config
from mepa_ds.config.pretrain import OnlineTeacher, PretrainConfig
from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
from mepa_ds.data.shards.index import INDEX_NAME, ShardIndex
from mepa_ds.planning.memory_trace import LiveBytes, materialise
from mepa_ds.teachers.base import Teacher
from mepa_ds.teachers.known_vits import TIMM_NAMES
from mepa_ds.teachers.registry import FITTED, build_teacher
from mepa_ds.teachers.timm_vit import TimmVit
from mepa_ds.tokenizer.tokenizer import Tokenizer
from mepa_ds.weights.directories import CONFIG_NAME

# Those of a ViT-B with 16 x 16 patches, assumed if the feature set is not there.
_ASSUMED_WIDTH, _ASSUMED_PATCHES = 768, 256


@dataclass
class FrozenNetworks:
    """Bytes are of one rank. `teacher_width` is None without semantic guidance."""

    teacher_width: int | None = None
    teacher_patches: int = 0
    weights: dict[str, float] = field(default_factory=dict)
    """Bytes of weights by part of the plan."""
    working: float | None = None
    """Memory at the peak of encoding one micro-batch of images; None: nothing is encoded (data.tokens)."""
    assumed: list[str] = field(default_factory=list)


def plan_networks(config: PretrainConfig, batch: int) -> FrozenNetworks:
    """For micro-batches of `batch` images a rank. Networks whose weights are not there are planned by their names.

    Raises UserError for a teacher that does not exist.
    """
    plan = FrozenNetworks()
    online, log = config.data.images is not None, config.log
    samples = log.sample_every is not None or log.score_every is not None
    teacher = None
    if config.objective.alignment is not None:
        if config.data.teacher is not None:
            teacher = _outline(config.data.teacher, plan.assumed)
            plan.teacher_width, plan.teacher_patches = teacher.width, teacher.grid_side**2
        else:
            plan.teacher_width, plan.teacher_patches = _stored(config.data.features, plan.assumed)
    if log.score_every is not None:
        plan.assumed.append("the networks of log.score take no memory: it is not counted")
    if not online and not samples:
        return plan
    tokenizer = _tokenizer(config, plan.assumed)
    if samples:
        plan.weights["tokenizer of samples"] = _bytes_of(tokenizer)
    if online:
        plan.weights["tokenizer and teacher"] = _bytes_of(tokenizer) + (0 if teacher is None else _bytes_of(teacher))
        shape = (batch, 3, tokenizer.config.image_side, tokenizer.config.image_side)
        peaks = [_peak(tokenizer, tokenizer.encode, shape)]
        if teacher is not None:
            peaks.append(_peak(teacher, teacher.patch_features, shape))
        plan.working = float(max(peaks))  # one after the other
    return plan


def _stored(features: Path | None, assumed: list[str]) -> tuple[int, int]:
    """Width and patches of the maps in a feature set."""
    there = features is not None and (features / INDEX_NAME).exists()
    settings = ShardIndex.read(features).made_by.settings if there and features is not None else {}
    if "width" in settings and "grid_side" in settings:
        return int(settings["width"]), int(settings["grid_side"]) ** 2
    assumed.append(
        f"teacher features of {_ASSUMED_PATCHES} patches, {_ASSUMED_WIDTH} wide (no data.features to read it from)"
    )
    return _ASSUMED_WIDTH, _ASSUMED_PATCHES


def _outline(teacher: OnlineTeacher, assumed: list[str]) -> Teacher:
    """The teacher of that name, without its weights."""
    if teacher.name in FITTED:
        if Path(teacher.weights).exists() and not is_unfinished(Path(teacher.weights)):
            return build_teacher(teacher.name, teacher.weights)
        assumed.append(f"{teacher.name} of its default size (no {teacher.weights} to read it from)")
        return FITTED[teacher.name]()
    import timm

    model_name = TIMM_NAMES.get(teacher.name, teacher.name)
    if not timm.is_model(model_name):
        return build_teacher(teacher.name, teacher.weights)  # raises the error that names known teachers
    return TimmVit.outline(teacher.name, model_name)


def _tokenizer(config: PretrainConfig, assumed: list[str]) -> Tokenizer:
    model, path = config.model, config.tokenizer
    if is_unfinished(path):
        recipe = path / "resolved.yaml"
        if recipe.exists():
            assumed.append(f"the tokenizer that {recipe} describes: its training has not finished")
            settings = load_config(TokenizerTrainingConfig, recipe).tokenizer.with_scales(model.scales, str(recipe))
            with torch.device("meta"):
                return Tokenizer(settings)
    elif path.exists():
        return Tokenizer.open(path, model.scales)
    assumed.append(f"a tokenizer of the size of VAR's (no {path} to read it from)")
    with torch.device("meta"):
        return Tokenizer(
            TokenizerConfig(scales=model.scales, codebook_size=model.codebook_size, code_width=model.code_width)
        )


def is_unfinished(directory: Path) -> bool:
    """Whether a network is still being trained there: the directory has only what training leaves before its end."""
    if not directory.is_dir() or (directory / CONFIG_NAME).exists():
        return False
    return (directory / "resolved.yaml").exists() or all(path.name.startswith(".") for path in directory.iterdir())


def _bytes_of(network: nn.Module) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()))


def _peak(network: nn.Module, run: Callable[[Tensor], object], shape: tuple[int, ...]) -> int:
    """Peak memory of `run` beside the weights, images included. The network cannot be used afterwards."""
    live = LiveBytes()
    with FakeTensorMode():
        materialise(network, torch.float32)
        live.ignore(tensor.detach() for tensor in [*network.parameters(), *network.buffers()])
        with live, torch.no_grad():
            run(torch.zeros(shape))
    return live.peak
