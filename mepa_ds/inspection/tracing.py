"""The routers' choices and the hidden states of a model, for samples or for the images of a token set.

Shapes: B images, l tokens of a scale, L positions of all scales, T = B L, Z code width, C model width, E experts, K
choices a token, S scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import INDEX_NAME
from mepa_ds.data.training import check_labels, read_samples
from mepa_ds.data.training_sets import open_training_sets
from mepa_ds.errors import UserError
from mepa_ds.generation.sampling import sample
from mepa_ds.images.pictures import signed_to_uint8, to_uint8
from mepa_ds.inspection.subject import Subject
from mepa_ds.models.block import Block
from mepa_ds.models.moe.routing import Routing
from mepa_ds.models.transformer import NextScaleTransformer

_OF_A_CLASS, _LEAST_CLASSES = 8, 4


@dataclass(frozen=True)
class Sampling:
    """How images are sampled, see `mepa_ds.generation.sampling.sample`."""

    cfg: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    seed: int = 0
    batch_size: int = 16

    def __str__(self) -> str:
        return f"cfg {self.cfg:g}, top-k {self.top_k}, top-p {self.top_p:g}, seed {self.seed}"


@dataclass(frozen=True)
class LayerChoices:
    """What the router of a layer chose for B images; NumPy, on the CPU."""

    first_BL: NDArray[np.int16]
    """The chosen expert of largest weight; -1 where no expert took the token (expert choice)."""
    chosen_BLE: NDArray[np.bool_]
    entropy_BL: NDArray[np.float32]
    """Entropy of the router's probabilities in nats."""


@dataclass(frozen=True)
class Traced:
    """Images with the choices of all routers, by block."""

    source: str
    """What the images are, for captions."""
    labels_B: NDArray[np.int64]
    pixels_BHW3: NDArray[np.uint8]
    layers: dict[int, LayerChoices]

    def first_of(self, label: int) -> int | None:
        """The first image of a class."""
        found = np.flatnonzero(self.labels_B == label)
        return int(found[0]) if len(found) else None


@contextmanager
def watched_routers(model: NextScaleTransformer) -> Iterator[dict[int, list[Routing]]]:
    """Yields a dictionary, by block, to which every call of a router within adds its decision."""
    seen: dict[int, list[Routing]] = {}
    hooks = []
    for index, block in enumerate(model.blocks):
        router = getattr(cast(Block, block).ffn, "router", None)
        if router is None:
            continue
        calls = seen.setdefault(index, [])
        hooks.append(router.register_forward_hook(_adds_to(calls)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _adds_to(calls: list[Routing]) -> Callable[[nn.Module, Any, Routing], None]:
    def add(module: nn.Module, inputs: Any, routing: Routing) -> None:
        calls.append(routing)

    return add


def choices_of(routing: Routing, batch: int) -> LayerChoices:
    """A routing of T = B L tokens, image after image."""
    weight_TK = routing.weight_TK
    if routing.kept_TK is not None:
        weight_TK = weight_TK.masked_fill(~routing.kept_TK, -1)
    best_T1 = weight_TK.argmax(-1, keepdim=True)
    first_T = routing.expert_index_TK.gather(-1, best_T1)[:, 0]
    first_T = first_T.masked_fill(weight_TK.gather(-1, best_T1)[:, 0] < 0, -1)
    chosen_TE = torch.zeros_like(routing.probs_TE, dtype=torch.bool).scatter_(
        1, routing.expert_index_TK, weight_TK >= 0
    )
    entropy_T = torch.special.entr(routing.probs_TE).sum(-1)

    def of_images(x_T: Tensor) -> NDArray[Any]:
        return x_T.unflatten(0, (batch, -1)).cpu().numpy()

    return LayerChoices(of_images(first_T.to(torch.int16)), of_images(chosen_TE), of_images(entropy_T.float()))


@torch.no_grad()
def trace(model: NextScaleTransformer, labels_B: Tensor, inputs_BLZ: Tensor) -> dict[int, LayerChoices]:
    """The choices for teacher-forced inputs, by block."""
    with watched_routers(model) as seen:
        model(labels_B, inputs_BLZ)
    return {block: choices_of(routing, len(labels_B)) for block, (routing,) in seen.items()}


class SampledInputs:
    """Gathers, as `on_scale` of a sampler, the teacher-forced inputs that a sampled image stands for."""

    def __init__(self, subject: Subject):
        self._quantizer = subject.tokenizer.quantizer
        self._last = subject.model.schedule.num_scales - 1
        self._parts: list[Tensor] = []

    def __call__(self, scale: int, f_hat: Tensor) -> None:
        if not self._parts:  # the first scale has no input from the codebook
            self._parts.append(f_hat.new_empty(len(f_hat), 0, f_hat.shape[1]))
        if scale < self._last:
            self._parts.append(self._quantizer.next_input(f_hat, scale))

    def inputs_BLZ(self) -> Tensor:
        return torch.cat(self._parts, dim=1)


def trace_samples(
    subject: Subject, labels: list[int], sampling: Sampling, on_images: Callable[[int], object]
) -> Traced:
    """Samples images of these classes, and routes them once more with their own tokens as inputs."""
    parts = []
    for start in range(0, len(labels), sampling.batch_size):
        part = labels[start : start + sampling.batch_size]
        gathered = SampledInputs(subject)
        images = draw(subject, part, sampling, start, on_scale=gathered)
        labels_B = torch.tensor(part, device=subject.device)
        layers = trace(subject.model, labels_B, gathered.inputs_BLZ())
        parts.append(Traced(f"samples, {sampling}", np.array(part), to_uint8(images), layers))
        on_images(len(part))
    return _joined(parts)


def draw(
    subject: Subject,
    labels: list[int],
    sampling: Sampling,
    first_index: int = 0,
    on_scale: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1]."""
    return sample(
        subject.model,
        subject.tokenizer,
        labels,
        cfg=sampling.cfg,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        first_index=first_index,
        on_scale=on_scale,
    )


def trace_tokens(
    subject: Subject, tokens: Path, numbers: Sequence[int], batch_size: int, on_images: Callable[[int], object]
) -> Traced:
    """Samples of a token set, by number, teacher-forced. Their pixels are the tokenizer's reconstructions."""
    parts: list[Traced] = []
    for start in range(0, len(numbers), batch_size):
        batch = read_samples(tokens, None, numbers[start : start + batch_size]).to(subject.device)
        layers = trace(subject.model, batch.labels_B, subject.tokenizer.inputs_from_tokens(batch.tokens_BL))
        pixels = signed_to_uint8(subject.tokenizer.decode(batch.tokens_BL))
        parts.append(Traced(f"images of {tokens.name}", batch.labels_B.cpu().numpy(), pixels, layers))
        on_images(len(batch.labels_B))
    return _joined(parts)


def choose_images(labels_N: NDArray[np.int64], shown: Sequence[int], count: int) -> list[int]:
    """Numbers of up to `count` images of a set, in order, about as many of each class.

    Sets may be sorted by class, so the first images would be of few. Few images are of few classes, since a class with
    one image tells nothing: of `_OF_A_CLASS` or more each, the shown classes among them.
    """
    there = np.unique(labels_N)
    most = min(max(count // _OF_A_CLASS, _LEAST_CLASSES), count)
    first = [label for label in shown if label in there][:most]
    others = [int(label) for label in there if label not in first]
    wanted = min(most, len(there)) - len(first)
    classes = [*first, *(others[place * len(others) // wanted] for place in range(wanted))]
    each = count // max(len(classes), 1)
    return sorted(int(number) for label in classes for number in np.flatnonzero(labels_N == label)[:each])


def labels_of(tokens: Path, num_classes: int) -> NDArray[np.int64]:
    """(N,) labels of a set. Raises UserError for a class that the model has not."""
    shards = ShardSet(tokens, "--tokens")
    labels_N = shards.read_labels(np.arange(len(shards)))
    check_labels(torch.from_numpy(labels_N), num_classes, lambda row: f"{tokens}: sample {row}")
    return labels_N


def held_out_tokens(subject: Subject) -> tuple[Path | None, str | None]:
    """The held-out token set of the run; and a line to say where it has one that is not there any more."""
    tokens = None if subject.recipe is None else subject.recipe.data.heldout_tokens
    if tokens is None or (tokens / INDEX_NAME).exists():
        return tokens, None
    return None, f"held-out images: {tokens} is not there any more; samples were routed instead (or give --tokens)"


def check_maker(subject: Subject, tokens: Path) -> None:
    """Raises UserError when a token set is another tokenizer's, or of other scales than the model's."""
    sets = open_training_sets(tokens, None, "--tokens")
    if sets.tokenizer.identity != subject.tokenizer.identity:
        raise UserError(
            f"{tokens}: made by tokenizer {sets.tokenizer.name!r} ({sets.tokenizer.identity}), but the tokenizer here "
            f"is {subject.tokenizer.identity}; give --tokenizer or --tokens that belong together"
        )


def _joined(parts: list[Traced]) -> Traced:
    def joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate(arrays)

    layers = {
        block: LayerChoices(
            joined([part.layers[block].first_BL for part in parts]),
            joined([part.layers[block].chosen_BLE for part in parts]),
            joined([part.layers[block].entropy_BL for part in parts]),
        )
        for block in parts[0].layers
    }
    return replace(
        parts[0],
        labels_B=joined([part.labels_B for part in parts]),
        pixels_BHW3=joined([part.pixels_BHW3 for part in parts]),
        layers=layers,
    )
