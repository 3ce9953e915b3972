"""The next-scale transformer: VAR (arXiv 2404.02905) with a dense or mixture-of-experts FFN in each block.

Shapes: B batch, L tokens over all scales, S scales, C width, H heads, V codebook size, Z code width, D blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig
from mepa_ds.config.tokenizer import checked_sides
from mepa_ds.errors import UserError
from mepa_ds.models.attention import KVCache, SelfAttention
from mepa_ds.models.feed_forward import FeedForward
from mepa_ds.models.initialisation import init_weights
from mepa_ds.models.moe.layer import MoEFeedForward
from mepa_ds.models.moe.routing import RoutingStatistics
from mepa_ds.models.recomputation import Recompute, run_block
from mepa_ds.models.transformer_files import KIND, read_transformer
from mepa_ds.models.var_checkpoint import Given, check_given, convert_var, name_in_var, name_of
from mepa_ds.weights.directories import load_strict, read_pretrained, save_pretrained

if TYPE_CHECKING:
    from mepa_ds.scales import ScaleSchedule

LAYER_NORM_EPS = 1e-6


@dataclass
class ModelOutput:
    """What a training forward returns; nothing is stashed in the modules."""

    logits_BLV: Tensor
    """(B, L, V) logits of every position, in the model's type."""
    hidden_BLC: Tensor | None
    """(B, L, C) after the block that `hidden_after` named, else None."""
    routing: dict[int, RoutingStatistics]
    """Statistics by index of the block, for MoE blocks only."""


class Block(nn.Module):
    """AdaLN, attention, AdaLN, FFN; each branch gated by gamma and scaled per sample by stochastic depth."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        C = config.C
        self.attention = SelfAttention(C, config.H, config.qk_norm)
        self.ffn: FeedForward | MoEFeedForward
        if config.is_moe_block(index):
            self.ffn = MoEFeedForward(config)
        else:
            self.ffn = FeedForward(C, round(config.ffn_ratio * C))
        if config.shared_adaln:
            self.adaln_offset = nn.Parameter(torch.empty(1, 1, 6, C))
        else:
            self.adaln = nn.Linear(C, 6 * C)

    def modulation(self, condition: Tensor) -> Tensor:
        """(B, 1, 6, C): gates, scales and shifts of both branches, the same at every position.

        `condition` is silu(class embedding) (B, C), or with shared AdaLN its projection (B, 1, 6, C).
        """
        if hasattr(self, "adaln_offset"):
            return self.adaln_offset + condition
        return self.adaln(condition).view(len(condition), 1, 6, -1)

    def forward(
        self,
        x_BLC: Tensor,
        modulation_B16C: Tensor,
        scale_index_L: Tensor,
        bounds: Sequence[tuple[int, int]],
        branch_scale_2B: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, RoutingStatistics | None]:
        """(B, L, C) -> the same and, from a MoE block, its routing statistics.

        `branch_scale_2B` scales the attention and FFN branch of each sample: 0 or 1 / keep (stochastic depth).
        """
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation_B16C.unbind(2)
        branch = self.attention(_modulate(x_BLC, scale1, shift1), bounds, cache)
        x_BLC = torch.addcmul(x_BLC, branch, _scaled(gamma1, branch_scale_2B, 0))
        normed = _modulate(x_BLC, scale2, shift2)
        statistics = None
        if isinstance(self.ffn, MoEFeedForward):
            branch, statistics = self.ffn(normed, scale_index_L)
        else:
            branch = self.ffn(normed)
        return torch.addcmul(x_BLC, branch, _scaled(gamma2, branch_scale_2B, 1)), statistics


class NextScaleTransformer(nn.Module):
    """Predicts the token map of each scale from all coarser ones and the class.

    The constructor draws the initial weights (seed 0); `init_weights(seed)` draws them anew. `recompute` says what
    the backward pass computes again instead of keeping it (see mepa_ds.models.recomputation).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.schedule: ScaleSchedule = config.schedule
        C, S, L = config.C, self.schedule.num_scales, self.schedule.num_tokens
        self.word_embed = nn.Linear(config.code_width, C)
        self.class_embed = nn.Embedding(config.num_classes + 1, C)
        self.start_embed = nn.Parameter(torch.empty(1, self.schedule.lengths[0], C))
        self.position_embed = nn.Parameter(torch.empty(1, L, C))
        self.scale_embed = nn.Embedding(S, C)
        self.shared_adaln = nn.Linear(C, 6 * C) if config.shared_adaln else None
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.head_adaln = nn.Linear(C, 2 * C)
        self.head = nn.Linear(C, config.codebook_size)
        self.recompute: Recompute = "none"
        if self.head.weight.device.type != "meta":
            self.init_weights(seed=0)

    @classmethod
    def from_preset(
        cls, preset: str, *, num_classes: int = 1000, scales: Sequence[int] | None = None, **overrides: object
    ) -> Self:
        """A freshly initialised model of a named size, for instance "var-d16" or "mepa-d16-iso"."""
        values: dict[str, object] = {"preset": preset, "num_classes": num_classes, **overrides}
        if scales is not None:
            values["scales"] = checked_sides(scales, "model")
        return cls(validate(ModelConfig, values, "model"))

    @classmethod
    def open(
        cls,
        path: Path | str,
        scales: Sequence[int] | None = None,
        *,
        num_heads: int | None = None,
        depth: int | None = None,
    ) -> Self:
        """Whichever lies there: a directory (`load`), or VAR's transformer (`from_var`), in evaluation mode.

        Raises UserError for what is neither, and for scales, heads or a depth that the weights do not have.
        """
        given = Given(scales, num_heads, depth)
        config, state, name_in_file = read_transformer(Path(path), given)
        check_given(config, given, str(path))
        return cls._with_weights(config, state, str(path), name_in_file)

    @classmethod
    def from_var(
        cls,
        weights: Path | str | Mapping[str, Tensor],
        *,
        scales: Sequence[int] | None = None,
        num_heads: int | None = None,
        depth: int | None = None,
    ) -> Self:
        """Loads VAR's weights: public ones, a checkpoint of its training, a directory of its class, or a state dict.

        Sizes are read off the tensors and the settings beside them. To be given, where these do not tell: `scales`
        that are neither VAR's for 256 px nor for 512 px, `num_heads` without QK normalisation, and a `depth` that is
        not width / 64.
        """
        given, where = Given(scales, num_heads, depth), name_of(weights)
        config, state = convert_var(weights, given)
        check_given(config, given, where)
        return cls._with_weights(config, state, where, name_in_var)

    @classmethod
    def load(cls, directory: Path | str) -> Self:
        """Loads what `save_pretrained` wrote (safetensors + config.json), in evaluation mode."""
        config, state = read_pretrained(Path(directory), ModelConfig, KIND)
        return cls._with_weights(config, state, str(directory))

    def save_pretrained(self, directory: Path | str) -> None:
        """Writes safetensors and config.json in the Hugging Face layout."""
        save_pretrained(Path(directory), self.config, self.state_dict(), KIND)

    @classmethod
    def _with_weights(
        cls, config: ModelConfig, state: Mapping[str, Tensor], where: str, name_in_file: Callable[[str], str] = str
    ) -> Self:
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        load_strict(model, state, where, name_in_file)
        return model.eval()

    def init_weights(self, seed: int) -> None:
        """Draws every parameter anew, as VAR does (see `initialisation`)."""
        init_weights(self, seed)

    def forward(
        self,
        labels_B: Tensor,
        inputs_BLZ: Tensor,
        *,
        branch_scale_D2B: Tensor | None = None,
        hidden_after: int | None = None,
    ) -> ModelOutput:
        """Teacher-forced logits of all scales.

        labels_B: int64 class of each image, `num_classes` for none. inputs_BLZ: (B, L - l0, Z), the tokenizer's
        `inputs_from_tokens`, where l0 is the first scale's length. branch_scale_D2B: stochastic depth's factors.
        hidden_after: block (0-based) after which the hidden states are returned.

        Inputs that end with an earlier scale give the logits of the scales up to it: those of the whole, cut there.

        Raises UserError for labels outside 0..num_classes, or inputs of another schedule.
        """
        self.check_labels(labels_B)
        expected = (len(labels_B), self.schedule.num_tokens - self.schedule.lengths[0], self.config.code_width)
        positions = self.schedule.lengths[0] + inputs_BLZ.shape[1] if inputs_BLZ.ndim == 3 else 0
        bounds = [(start, end) for start, end in self.schedule.bounds if end <= positions]
        if not bounds or bounds[-1][1] != positions or (len(inputs_BLZ), inputs_BLZ.shape[2]) != expected[::2]:
            raise UserError(f"inputs: expected (B, L - l0, code width) = {expected}, got {tuple(inputs_BLZ.shape)}")
        class_BC = self.class_embed(labels_B)
        words_BLC = self.word_embed(inputs_BLZ.to(self.word_embed.weight.dtype))
        scale_index_L = self.schedule.scale_index_L(labels_B.device)[:positions]
        x_BLC = torch.cat([class_BC[:, None] + self.start_embed, words_BLC], dim=1)
        x_BLC = x_BLC + self._where_BLC(scale_index_L, 0)
        condition = self.condition(class_BC)
        hidden, routing = None, {}
        for index, block in enumerate(self.blocks):
            branch_scale_2B = None if branch_scale_D2B is None else branch_scale_D2B[index]
            modulation = cast(Block, block).modulation(condition)
            arguments = (x_BLC, modulation, scale_index_L, bounds, branch_scale_2B)
            x_BLC, statistics = run_block(block, arguments, self.recompute)
            if statistics is not None:
                routing[index] = statistics
            if index == hidden_after:
                hidden = x_BLC
        return ModelOutput(self.logits(x_BLC, class_BC), hidden, routing)

    def check_labels(self, labels_B: Tensor) -> None:
        """Raises UserError for labels outside 0..num_classes. On a GPU the embedding's own assert serves: no sync."""
        if labels_B.is_cuda or labels_B.numel() == 0:
            return
        low, high = int(labels_B.min()), int(labels_B.max())
        if low < 0 or high > self.config.num_classes:
            raise UserError(
                f"labels: expected 0..{self.config.num_classes - 1} (or {self.config.num_classes} for no class), "
                f"got {low if low < 0 else high}"
            )

    # The pieces that sampling calls scale by scale.

    def condition(self, class_BC: Tensor) -> Tensor:
        """What the blocks' AdaLN reads."""
        condition = F.silu(class_BC)
        if self.shared_adaln is not None:
            return self.shared_adaln(condition).view(-1, 1, 6, self.config.C)
        return condition

    def first_input(self, class_BC: Tensor) -> Tensor:
        """(B, l0, C): the start tokens, with position."""
        return class_BC[:, None] + self.start_embed + self._where_BLC(self._scale_index(0, class_BC), 0)

    def next_input(self, codes_BlZ: Tensor, scale: int) -> Tensor:
        """(B, l, Z) downsampled f_hat -> (B, l, C): the tokens of `scale`, with position."""
        start = self.schedule.bounds[scale][0]
        words_BlC = self.word_embed(codes_BlZ.to(self.word_embed.weight.dtype))
        return words_BlC + self._where_BLC(self._scale_index(scale, codes_BlZ), start)

    def modulations(self, class_BC: Tensor) -> list[Tensor]:
        """Every block's modulation: it depends on the class alone, so sampling computes it once for all scales."""
        condition = self.condition(class_BC)
        return [cast(Block, block).modulation(condition) for block in self.blocks]

    def run_scale(self, x_BlC: Tensor, modulations: Sequence[Tensor], scale: int, caches: Sequence[KVCache]) -> Tensor:
        """One scale through all blocks, with the scales before it in the caches."""
        scale_index_l = self._scale_index(scale, x_BlC)
        for block, modulation, cache in zip(self.blocks, modulations, caches, strict=True):
            x_BlC, _ = block(x_BlC, modulation, scale_index_l, (), cache=cache)
        return x_BlC

    def new_caches(self, batch: int) -> list[KVCache]:
        head_width = self.config.C // self.config.H
        like = self.head.weight
        return [KVCache(batch, self.config.H, self.schedule.num_tokens, head_width, like) for _ in self.blocks]

    def logits(self, x_BLC: Tensor, class_BC: Tensor) -> Tensor:
        """Final AdaLN and head: (B, L, C) -> (B, L, V)."""
        scale, shift = self.head_adaln(F.silu(class_BC)).view(-1, 1, 2, self.config.C).unbind(2)
        return self.head(_modulate(x_BLC, scale, shift))

    def _scale_index(self, scale: int, like: Tensor) -> Tensor:
        return torch.full((self.schedule.lengths[scale],), scale, device=like.device)

    def _where_BLC(self, scale_index_L: Tensor, start: int) -> Tensor:
        positions = self.position_embed[:, start : start + len(scale_index_L)]
        return self.scale_embed(scale_index_L) + positions


def _modulate(x_BLC: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm without weights, then the class's scale and shift."""
    return torch.addcmul(shift, F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=LAYER_NORM_EPS), 1 + scale)


def _scaled(gamma_B1C: Tensor, branch_scale_2B: Tensor | None, which: int) -> Tensor:
    if branch_scale_2B is None:
        return gamma_B1C
    return gamma_B1C * branch_scale_2B[which].to(gamma_B1C.dtype)[:, None, None]
