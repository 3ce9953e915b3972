"""Class-conditional sampling, scale by scale, with classifier-free guidance (VAR's sampler).

Shapes: B images, l tokens of the current scale, L tokens over all scales, V codebook, Z code width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mepa_ds.errors import UserError
from mepa_ds.generation.class_names import labels_of
from mepa_ds.generation.scale_blocks import block_runner
from mepa_ds.machine import copied_to
from mepa_ds.models.block import BlockRunner
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.random_streams import uniforms
from mepa_ds.tokenizer.tokenizer import Tokenizer

Rng = Literal["image", "var"]
OnScale = Callable[[int, Tensor], None]
"""Is called with the number of each scale and f_hat (B, Z, H, W) after it, batch by batch."""


class NonFiniteLogitsError(UserError):
    """The model's logits are NaN or infinite. A run that samples while it trains may catch this and continue."""


@torch.no_grad()
def sample(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    labels_B: Tensor | Sequence[int | str],
    *,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seed: int = 0,
    batch_size: int | None = None,
    first_index: int = 0,
    smooth: bool = False,
    rng: Rng = "image",
    compiled: bool = False,
    on_scale: OnScale | None = None,
) -> Tensor:
    """Generates one image for each label: (B, 3, H, W) float32 in [0, 1]. The model samples in evaluation mode.

    Args:
        labels_B: classes in 0..num_classes - 1, or by their names, for a model that has `class_names`.
        cfg: guidance; at scale k of 0..S-1 the logits are (1 + t) conditional - t unconditional, t = cfg k / (S - 1).
        top_k: keep the k most probable codes; 0 keeps all.
        top_p: of those, keep the most probable ones whose mass first exceeds p; 0 or 1 keeps all.
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
    labels = _as_labels(labels_B, model.class_names).to(device)
    _check(model, tokenizer, labels, rng, batch_size)
    _check_numbers(cfg, top_k, top_p, seed, first_index)
    tokenizer = tokenizer.to(device)
    step = batch_size or max(len(labels), 1)
    images = []
    with _evaluating(model), block_runner(model, compiled) as run:
        for start in range(0, len(labels), step):
            part = labels[start : start + step]
            generator = torch.Generator(device).manual_seed(seed) if rng == "var" else None
            index_B = np.arange(first_index + start, first_index + start + len(part))
            draw = (_SmoothDraw if smooth else _CodeDraw)(seed, index_B, generator, top_k, top_p)
            images.append(_sample_batch(model, tokenizer, part, cfg, draw, run, on_scale))
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


def _sample_batch(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    labels_B: Tensor,
    cfg: float,
    draw: _Draw,
    run: BlockRunner,
    on_scale: OnScale | None,
) -> Tensor:
    quantizer, schedule = tokenizer.quantizer, model.schedule
    B, guided = len(labels_B), cfg != 0
    null_B = torch.full_like(labels_B, model.config.num_classes)
    class_BC = model.class_embed(torch.cat([labels_B, null_B]) if guided else labels_B)
    modulations = model.modulations(class_BC)
    caches = model.new_caches(len(class_BC))
    f_hat = quantizer.empty_f_hat(B)
    x_BlC = model.first_input(class_BC)
    total = f_hat.new_zeros(())  # of all logits: NaN or infinite if any of them is
    for scale in range(schedule.num_scales):
        ratio = scale / max(schedule.num_scales - 1, 1)
        t = cfg * ratio
        x_BlC = model.run_scale(x_BlC, modulations, scale, caches, run)
        rows = len(class_BC) if t else B  # without a weight the unconditional rows only leave their keys and values
        logits_BlV = model.logits(x_BlC[:rows], class_BC[:rows]).float()
        if t:
            logits_BlV = (1 + t) * logits_BlV[:B] - t * logits_BlV[B:]
        total = total + logits_BlV.sum()
        if draw.generator is not None:  # torch.multinomial would fail on them with a message of its own
            _check_finite(total)
        codes_BlZ = draw(logits_BlV, scale, ratio, quantizer.codebook.weight)
        f_hat = quantizer.add_codes(f_hat, codes_BlZ, scale)
        if on_scale is not None:
            on_scale(scale, f_hat)
        if scale + 1 < schedule.num_scales:
            next_BlZ = quantizer.next_input(f_hat, scale)
            x_BlC = model.next_input(torch.cat([next_BlZ, next_BlZ]) if guided else next_BlZ, scale + 1)
    _check_finite(total)  # only once a batch: on a GPU it waits for all queued work
    del caches  # decoding takes as much memory again
    return tokenizer.decode_f_hat(f_hat).float().add(1).mul(0.5).clamp(0, 1)


def keep_top(logits_BlV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Sets all but the top-k, then all but the top-p codes to -inf (VAR's order and comparisons)."""
    V = logits_BlV.shape[-1]
    if 0 < top_k < V:
        smallest = logits_BlV.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        logits_BlV = logits_BlV.masked_fill(logits_BlV < smallest, -torch.inf)
    if 0 < top_p < 1:
        ascending, order = logits_BlV.sort(dim=-1)
        remove = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        remove[..., -1:] = False
        logits_BlV = logits_BlV.masked_fill(remove.scatter(-1, order, remove), -torch.inf)
    return logits_BlV


class _Draw:
    """Turns the logits of a scale into codes; `generator` only with rng="var"."""

    def __init__(self, seed: int, index_B: np.ndarray, generator: torch.Generator | None, top_k: int, top_p: float):
        self.seed, self.index_B, self.generator = seed, index_B, generator
        self.top_k, self.top_p = top_k, top_p

    def __call__(self, logits_BlV: Tensor, scale: int, ratio: float, codebook_VZ: Tensor) -> Tensor:
        """(B, l, Z) codes. ratio: the scale's place in 0..1."""
        raise NotImplementedError

    def var_tokens(self, kept_BlV: Tensor) -> Tensor:
        drawn = torch.multinomial(kept_BlV.softmax(-1).flatten(0, 1), 1, generator=self.generator)
        return drawn.view(kept_BlV.shape[:2])


class _CodeDraw(_Draw):
    """Draws one code for each position."""

    def __call__(self, logits_BlV: Tensor, scale: int, ratio: float, codebook_VZ: Tensor) -> Tensor:
        if self.generator is not None:
            return codebook_VZ[self.var_tokens(keep_top(logits_BlV, self.top_k, self.top_p))]
        drawn_Bl = uniforms(self.seed, f"sample/{scale}", self.index_B, logits_BlV.shape[1])
        uniform_Bl = copied_to(torch.from_numpy(drawn_Bl), logits_BlV.device)
        chosen_Bl = draw_top(logits_BlV, self.top_k, self.top_p, uniform_Bl)
        return codebook_VZ[chosen_Bl]


def draw_top(logits_BlV: Tensor, top_k: int, top_p: float, uniform_Bl: Tensor) -> Tensor:
    """(B, l) codes: inverse of the cumulative distribution over `keep_top`'s codes at one uniform number a position.

    Works on the k largest logits in descending order: no sort of the whole codebook, and rounding of the sums can
    never make an excluded code come out.
    """
    V = logits_BlV.shape[-1]
    logits_Blk, codes_Blk = logits_BlV.topk(min(top_k, V) if top_k > 0 else V, dim=-1)
    mass_Blk = logits_Blk.softmax(-1).cumsum(-1)
    count_Bl1 = torch.full_like(codes_Blk[..., :1], codes_Blk.shape[-1])
    if 0 < top_p < 1:
        # A code stays while the mass before it is below p.
        count_Bl1 = (mass_Blk < top_p).sum(-1, keepdim=True).add_(1).clamp_(max=codes_Blk.shape[-1])
    target_Bl1 = uniform_Bl[..., None] * mass_Blk.gather(-1, count_Bl1 - 1)
    place_Bl1 = torch.minimum(torch.searchsorted(mass_Blk, target_Bl1, right=True), count_Bl1 - 1)
    return codes_Blk.gather(-1, place_Bl1)[..., 0]


class _SmoothDraw(_Draw):
    """Mixes the kept codes by Gumbel-softmax weights, colder at finer scales."""

    def __call__(self, logits_BlV: Tensor, scale: int, ratio: float, codebook_VZ: Tensor) -> Tensor:
        temperature = max(0.27 * (1 - ratio * 0.95), 0.005)
        kept_BlV = keep_top(logits_BlV, self.top_k, self.top_p)
        if self.generator is not None:
            self.var_tokens(kept_BlV)  # VAR draws them, and then mixes: its generator has moved on
            noise = torch.empty_like(kept_BlV).exponential_(generator=self.generator)
        else:
            count = kept_BlV.shape[1] * kept_BlV.shape[2]
            drawn = uniforms(self.seed, f"smooth/{scale}", self.index_B, count)
            noise = -copied_to(torch.from_numpy(drawn), kept_BlV.device).view_as(kept_BlV).neg().log1p()
        gumbels = -noise.clamp_min(1e-30).log()
        weights = F.softmax((kept_BlV * (1 + ratio) + gumbels) / temperature, dim=-1)
        return weights @ codebook_VZ.float()


def _as_labels(labels_B: Tensor | Sequence[int | str], names: Sequence[str]) -> Tensor:
    """(B,) int64."""
    if isinstance(labels_B, str):
        raise UserError(f"labels: expected a list with a class for each image, such as [{labels_B!r}], got a text")
    try:
        if not isinstance(labels_B, (Tensor, np.ndarray)):
            labels_B = labels_of(labels_B, names)
        elif isinstance(labels_B, np.ndarray) and labels_B.dtype.kind in "UO":
            labels_B = labels_of(labels_B.tolist(), names)
        labels = torch.as_tensor(labels_B)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"labels: expected a list of class numbers ({error})") from error
    if labels.ndim != 1 or (len(labels) and (labels.is_floating_point() or labels.dtype == torch.bool)):
        raise UserError(
            f"labels: expected a list of class numbers, got {str(labels.dtype).removeprefix('torch.')} of shape "
            f"{tuple(labels.shape)}"
        )
    return labels.to(torch.int64)


def _check_finite(total: Tensor) -> None:
    if not torch.isfinite(total):
        raise NonFiniteLogitsError(
            "sampling: the model's logits are NaN or infinite; its weights are damaged, or overflow in this precision "
            "(bf16 has fp32's range, fp16 has not)"
        )


def _check(model: NextScaleTransformer, tokenizer: Tokenizer, labels: Tensor, rng: str, batch_size: int | None) -> None:
    if rng not in get_args(Rng):
        raise UserError(f"rng: expected one of {', '.join(get_args(Rng))}, got {rng!r}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size: expected at least 1, or None for all at once; got {batch_size}")
    last = model.config.num_classes - 1
    outside = sorted({int(label) for label in labels.tolist() if not 0 <= label <= last})
    if outside:
        raise UserError(f"labels: {outside} are no classes of this model; give 0..{last}")
    for name in ("scales", "codebook_size", "code_width"):
        ours, theirs = getattr(model.config, name), getattr(tokenizer.config, name)
        if ours != theirs:
            raise UserError(f"tokenizer: its {name} is {theirs}, the model's {ours}; give the model's own tokenizer")
    if rng == "var" and batch_size is not None and batch_size < len(labels):
        raise UserError('rng="var" draws for the whole batch at once: leave batch_size unset')


def _check_numbers(cfg: float, top_k: int, top_p: float, seed: int, first_index: int) -> None:
    for name, number in (("top_k", top_k), ("seed", seed), ("first_index", first_index)):
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 0:
            raise UserError(f"{name}: expected a whole number of at least 0, got {number!r}")
    if isinstance(cfg, bool) or not isinstance(cfg, Real) or not math.isfinite(cfg):
        raise UserError(f"cfg: expected a finite number such as 1.5, got {cfg!r}")
    if isinstance(top_p, bool) or not isinstance(top_p, Real) or not 0 <= top_p <= 1:
        raise UserError(f"top_p: expected a number in 0..1, got {top_p!r}")
