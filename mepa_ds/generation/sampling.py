"""Class-conditional sampling, scale by scale, with classifier-free guidance (VAR's sampler).

Shapes: B images, l tokens of the current scale, L tokens over all scales, V codebook, Z code width, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.generation.by_scale import CfgSchedule, by_scale
from mepa_ds.generation.class_names import labels_of
from mepa_ds.generation.draws import CodeDraw, Draw, SmoothDraw
from mepa_ds.generation.editing import Given, checked
from mepa_ds.generation.scale_blocks import block_runner
from mepa_ds.models.block import BlockRunner
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer.tokenizer import Tokenizer

Rng = Literal["image", "var"]
_MOST_SEED = 2**63 - 1
"""Of PyTorch's generators."""
Labels = Tensor | NDArray[Any] | Sequence[int | str | None]
"""Classes in 0..num_classes - 1, or by their names, for a model that has `class_names`; None is no class."""
OnScale = Callable[[int, Tensor], None]
"""Is called with the number of each scale and f_hat (B, Z, H, W) after it, batch by batch."""


class NonFiniteLogitsError(UserError):
    """The model's logits are NaN or infinite. A run that samples while it trains may catch this and continue."""


@torch.no_grad()
def sample(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    labels_B: Labels,
    *,
    cfg: float | Sequence[float] = 1.5,
    cfg_schedule: CfgSchedule = "linear",
    guided_scales: tuple[int, int] | None = None,
    negative: Labels | None = None,
    towards: Labels | None = None,
    share: float = 0.5,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 900,
    top_p: float | Sequence[float] = 0.96,
    given: Given | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    first_index: int = 0,
    smooth: bool = False,
    rng: Rng = "image",
    compiled: bool = False,
    on_scale: OnScale | None = None,
) -> Tensor:
    """Generates one image for each label: (B, 3, H, W) float32 in [0, 1]. The model samples in evaluation mode.

    Whatever takes one value for all scales also takes a sequence with one for each, the coarsest first.

    Args:
        labels_B: classes in 0..num_classes - 1, or by their names, for a model that has `class_names`; None is no
            class (unconditional).
        cfg: guidance; at scale k of 0..S-1 the logits are (1 + t) conditional - t unconditional, t = cfg k / (S - 1).
            A sequence holds the weights t themselves.
        cfg_schedule: "linear" as above; "constant": t = cfg at all scales.
        guided_scales: the first and the last scale with guidance (1-based); None: all.
        negative: classes to lead away from, in place of no class: one for each label.
        towards: a second class for each label; the class embeddings are mixed.
        share: of the second class, 0..1.
        temperature: divides the logits before top_k and top_p.
        top_k: keep the k most probable codes; 0 keeps all.
        top_p: of those, keep the most probable ones whose mass first exceeds p; 0 or 1 keeps all.
        given: tokens of an image, and which of them stay (mepa_ds.generation.editing).
        seed: image number i draws from a stream of its own, a function of (seed, first_index + i) alone.
        batch_size: images at a time (None: all); the result does not depend on it but for rounding.
        first_index: number of the first image, for a job that generates a part of a larger set.
        smooth: mix the codes that top_k and top_p leave by Gumbel-softmax weights instead of picking one (VAR's
            "more smooth", for demonstrations: never for evaluation).
        rng: "image" as above; "var" repeats VAR's own order of draws (one generator for the batch, so batch_size
            must be None).
        compiled: torch.compile the blocks, which takes a minute or so for each new batch size: for many images on a
            GPU. Logits then differ by rounding.
        on_scale: is called after every scale, to show how images come about.

    Raises:
        UserError: labels that are no list of the model's classes, a tokenizer of another schedule, codebook or code
            width, options out of range.
        NonFiniteLogitsError: the weights give NaN or infinity.
    """
    device = model.head.weight.device
    classes = _Classes.of(model, labels_B, negative, towards, share)
    _check(model, tokenizer, len(classes), rng, batch_size)
    for name, number in (("seed", seed), ("first_index", first_index)):
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 0:
            raise UserError(f"{name}: expected a whole number of at least 0, got {number!r}")
    if rng == "var" and seed > _MOST_SEED:
        raise UserError(f"seed: VAR's order of draws takes 0..{_MOST_SEED}, got {seed}")
    S = model.schedule.num_scales
    settings = by_scale(S, cfg, cfg_schedule, guided_scales, temperature, top_k, top_p)
    if given is not None:
        given = checked(given, len(classes), model.schedule, model.config.codebook_size)
    tokenizer = tokenizer.to(device)
    step = batch_size or max(len(classes), 1)
    images = []
    with _evaluating(model), block_runner(model, compiled) as run:
        for start in range(0, len(classes), step):
            part = slice(start, min(start + step, len(classes)))
            generator = torch.Generator(device).manual_seed(seed) if rng == "var" else None
            index_B = np.arange(first_index + part.start, first_index + part.stop)
            draw = (SmoothDraw if smooth else CodeDraw)(seed, index_B, generator, settings)
            kept = None if given is None else Given(given.tokens_BL[part].to(device), given.keep_L.to(device))
            images.append(_sample_batch(model, tokenizer, classes.part(part), draw, kept, run, on_scale))
    side = tokenizer.config.image_side
    return torch.cat(images) if images else torch.empty(0, 3, side, side)


@contextmanager
def _evaluating(model: NextScaleTransformer) -> Iterator[None]:
    """Evaluation mode within. In training mode experts have a capacity, and an image would depend on its batch."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass
class _Classes:
    """What images are of: (B,) int64 each, on the model's device. No class is the number behind the last."""

    labels_B: Tensor
    negative_B: Tensor
    towards_B: Tensor | None
    share: float

    @classmethod
    def of(
        cls, model: NextScaleTransformer, labels: Labels, negative: Labels | None, towards: Labels | None, share: float
    ) -> _Classes:
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
            raise UserError(f"share: expected a number in 0..1, got {share!r}")
        labels_B = _as_labels(labels, model, "labels")
        others: dict[str, Tensor] = {}
        for name, given in (("negative", negative), ("towards", towards)):
            if given is not None:
                others[name] = _as_labels(given, model, name)
                if (count := len(others[name])) != len(labels_B):
                    raise UserError(f"{name}: has {count} classes for {len(labels_B)} labels; give one for each")
        none_B = torch.full_like(labels_B, model.config.num_classes)
        return cls(labels_B, others.get("negative", none_B), others.get("towards"), share)

    def __len__(self) -> int:
        return len(self.labels_B)

    def part(self, part: slice) -> _Classes:
        towards_B = None if self.towards_B is None else self.towards_B[part]
        return _Classes(self.labels_B[part], self.negative_B[part], towards_B, self.share)

    def embedded(self, model: NextScaleTransformer, guided: bool) -> Tensor:
        """(B, C), or (2 B, C) with the classes to lead away from behind."""
        class_BC = model.class_embed(torch.cat([self.labels_B, self.negative_B]) if guided else self.labels_B)
        if self.towards_B is not None:
            mixed_BC = torch.lerp(class_BC[: len(self)], model.class_embed(self.towards_B), self.share)
            class_BC = torch.cat([mixed_BC, class_BC[len(self) :]])
        return class_BC


def _sample_batch(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    classes: _Classes,
    draw: Draw,
    given: Given | None,
    run: BlockRunner,
    on_scale: OnScale | None,
) -> Tensor:
    quantizer, schedule, settings = tokenizer.quantizer, model.schedule, draw.by_scale
    B, guided = len(classes), any(settings.cfg_S)
    class_BC = classes.embedded(model, guided)
    modulations = model.modulations(class_BC)
    caches = model.new_caches(len(class_BC))
    f_hat = quantizer.empty_f_hat(B)
    x_BlC = model.first_input(class_BC)
    total = f_hat.new_zeros(())  # of all logits: NaN or infinite if any of them is
    for scale in range(schedule.num_scales):
        t, temperature = settings.cfg_S[scale], settings.temperature_S[scale]
        x_BlC = model.run_scale(x_BlC, modulations, scale, caches, run)
        rows = len(class_BC) if t else B  # without a weight the unconditional rows only leave their keys and values
        logits_BlV = model.logits(x_BlC[:rows], class_BC[:rows]).float()
        if t:
            logits_BlV = (1 + t) * logits_BlV[:B] - t * logits_BlV[B:]
        total = total + logits_BlV.sum()
        if draw.generator is not None:  # torch.multinomial would fail on them with a message of its own
            _check_finite(total)
        if temperature != 1:
            logits_BlV = logits_BlV / temperature
        codes_BlZ = draw(logits_BlV, scale, quantizer.codebook.weight)
        if given is not None:
            codes_BlZ = _with_given(codes_BlZ, given, slice(*schedule.bounds[scale]), quantizer.codebook.weight)
        f_hat = quantizer.add_codes(f_hat, codes_BlZ, scale)
        if on_scale is not None:
            on_scale(scale, f_hat)
        if scale + 1 < schedule.num_scales:
            next_BlZ = quantizer.next_input(f_hat, scale)
            x_BlC = model.next_input(torch.cat([next_BlZ, next_BlZ]) if guided else next_BlZ, scale + 1)
    _check_finite(total)  # only once a batch: on a GPU it waits for all queued work
    del caches  # decoding takes as much memory again
    return tokenizer.decode_f_hat(f_hat).float().add(1).mul(0.5).clamp(0, 1)


def _with_given(codes_BlZ: Tensor, given: Given, scale: slice, codebook_VZ: Tensor) -> Tensor:
    """All codes are drawn, so that the draws of the others do not depend on what stays (and are VAR's)."""
    return torch.where(given.keep_L[scale, None], codebook_VZ[given.tokens_BL[:, scale]], codes_BlZ)


def _as_labels(given: Labels, model: NextScaleTransformer, what: str) -> Tensor:
    """(B,) int64."""
    if isinstance(given, str):
        raise UserError(f"{what}: expected a list with a class for each image, such as [{given!r}], got a text")
    none, is_none_B = model.config.num_classes, [False]
    try:
        if isinstance(given, np.ndarray) and given.dtype.kind in "UO":
            given = given.tolist()
        if isinstance(given, (list, tuple)):
            is_none_B = [label is None for label in given]
            given = labels_of([0 if label is None else label for label in given], model.class_names)
        labels = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{what}: expected a list of class numbers ({error})") from error
    if labels.ndim != 1 or (len(labels) and (labels.is_floating_point() or labels.dtype == torch.bool)):
        raise UserError(
            f"{what}: expected a list of class numbers, got {str(labels.dtype).removeprefix('torch.')} of shape "
            f"{tuple(labels.shape)}"
        )
    labels = labels.to(model.head.weight.device, torch.int64)
    if outside := sorted({int(label) for label in labels.tolist() if not 0 <= label < none}):
        raise UserError(f"{what}: {outside} are no classes of this model; give 0..{none - 1}, or None for no class")
    return labels.masked_fill(torch.tensor(is_none_B, device=labels.device), none) if any(is_none_B) else labels


def _check_finite(total: Tensor) -> None:
    if not torch.isfinite(total):
        raise NonFiniteLogitsError(
            "sampling: the model's logits are NaN or infinite; its weights are damaged, or overflow in this precision "
            "(bf16 has fp32's range, fp16 has not)"
        )


def _check(model: NextScaleTransformer, tokenizer: Tokenizer, count: int, rng: str, batch_size: int | None) -> None:
    if rng not in get_args(Rng):
        raise UserError(f"rng: expected one of {', '.join(get_args(Rng))}, got {rng!r}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size: expected at least 1, or None for all at once; got {batch_size}")
    for name in ("scales", "codebook_size", "code_width"):
        ours, theirs = getattr(model.config, name), getattr(tokenizer.config, name)
        if ours != theirs:
            raise UserError(f"tokenizer: its {name} is {theirs}, the model's {ours}; give the model's own tokenizer")
    if rng == "var" and batch_size is not None and batch_size < count:
        raise UserError('rng="var" draws for the whole batch at once: leave batch_size unset')
