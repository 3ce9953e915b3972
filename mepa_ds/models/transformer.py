"""The next-scale transformer: VAR (arXiv 2404.02905) with a dense or mixture-of-experts FFN in each block.

Shapes: B batch, L tokens of all scales, l tokens of one scale (l0 of the first), S scales, C width, V codebook size,
Z code width, D blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from mepa_ds.models.attention import KVCache
from mepa_ds.models.block import Block, BlockRunner, modulate, run_scale_of
from mepa_ds.models.initialisation import init_weights
from mepa_ds.models.moe.routing import RoutingStatistics
from mepa_ds.models.recomputation import Recompute, run_block
from mepa_ds.models.transformer_files import KIND, read_transformer, with_weights
from mepa_ds.models.var_checkpoint import convert_var, name_in_var, name_of
from mepa_ds.weights.directories import read_class_names, read_pretrained, save_pretrained
from mepa_ds.weights.var_sizes import GivenSizes, check_given

if TYPE_CHECKING:
    from mepa_ds.scales import ScaleSchedule


@dataclass
class ModelOutput:
    """What a training forward pass returns. The modules keep no results."""

    logits_BLV: Tensor
    """Logits of every position, (B, L, V), in the model's type."""
    hidden_BLC: Tensor | None
    """Hidden states after the block that `hidden_after` names, (B, L, C); None if it names none."""
    routing: dict[int, RoutingStatistics]
    """Routing statistics of each MoE block, by the index of the block."""


class NextScaleTransformer(nn.Module):
    """Predicts the token map of each scale from the maps of all coarser scales and the class.

    The constructor draws the initial weights with seed 0, except on the meta device; `init_weights(seed)` draws them
    again. `recompute` says which activations the backward pass computes again (see mepa_ds.models.recomputation).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.schedule: ScaleSchedule = config.schedule
        self.class_names: tuple[str, ...] = ()
        """Names of the classes by label, of the data or of config.json; empty where none are known."""
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
        """Returns a newly initialised model of a named size, for instance "var-d16" or "mepa-d16-iso"."""
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
        """Loads weights from a path: a directory of ours (as `load`), or VAR's transformer (as `from_var`).

        The model is in evaluation mode. Raises UserError for anything else at that path, and for scales, heads or a
        depth that the weights do not have.
        """
        given = GivenSizes(scales, num_heads, depth)
        stored = read_transformer(Path(path), given)
        check_given(stored.config, given, str(path))
        model = with_weights(partial(cls, stored.config), stored.state, str(path), stored.name_in_file)
        model.class_names = stored.class_names
        return model

    @classmethod
    def from_var(
        cls,
        weights: Path | str | Mapping[str, Tensor],
        *,
        scales: Sequence[int] | None = None,
        num_heads: int | None = None,
        depth: int | None = None,
    ) -> Self:
        """Loads VAR's weights: a public file, a checkpoint of VAR's training, a directory of its class, a state dict.

        The sizes are read from the tensors and from the settings beside them. Where these do not tell, the caller
        gives them: `scales` that are neither VAR's for 256 px nor for 512 px, `num_heads` of a model without QK
        normalisation, and a `depth` that is not width / 64.
        """
        given, where = GivenSizes(scales, num_heads, depth), name_of(weights)
        config, state = convert_var(weights, given)
        check_given(config, given, where)
        return with_weights(partial(cls, config), state, where, name_in_var)

    @classmethod
    def load(cls, directory: Path | str) -> Self:
        """Loads a directory of `save_pretrained` (safetensors and config.json), in evaluation mode."""
        config, state = read_pretrained(Path(directory), ModelConfig, KIND)
        model = with_weights(partial(cls, config), state, str(directory))
        model.class_names = read_class_names(directory)
        return model

    def save_pretrained(self, directory: Path | str) -> None:
        """Writes safetensors and config.json in the layout of Hugging Face."""
        save_pretrained(Path(directory), self.config, self.state_dict(), KIND, class_names=self.class_names)

    def init_weights(self, seed: int, base_width: int | None = None) -> None:
        """Draws every parameter as VAR does (see mepa_ds.models.initialisation); with a base width, for muP."""
        init_weights(self, seed, base_width)

    def forward(
        self,
        labels_B: Tensor,
        inputs_BLZ: Tensor,
        *,
        branch_scale_D2B: Tensor | None = None,
        hidden_after: int | None = None,
    ) -> ModelOutput:
        """Computes the logits of all scales with teacher forcing.

        Inputs that end with an earlier scale give the logits of the scales up to that one. They equal the logits of
        the whole sequence, cut there.

        Args:
            labels_B: int64 class of each image; `num_classes` stands for no class.
            inputs_BLZ: (B, L - l0, Z), which the tokenizer's `inputs_from_tokens` computes.
            branch_scale_D2B: factors of stochastic depth (see `Block.forward`).
            hidden_after: 0-based index of the block after which the hidden states are returned.

        Raises:
            UserError: labels outside 0..num_classes, or inputs of another schedule.
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
        """Raises UserError for labels outside 0..num_classes.

        Labels on a GPU are not checked, which would need a host sync; the embedding asserts the same there.
        """
        if labels_B.is_cuda or labels_B.numel() == 0:
            return
        low, high = int(labels_B.min()), int(labels_B.max())
        if low < 0 or high > self.config.num_classes:
            raise UserError(
                f"labels: expected 0..{self.config.num_classes - 1} (or {self.config.num_classes} for no class), "
                f"got {low if low < 0 else high}"
            )

    # Sampling calls the following methods, scale by scale.

    def condition(self, class_BC: Tensor) -> Tensor:
        """The input of every block's AdaLN: silu(class), (B, C), or its shared projection, (B, 1, 6, C)."""
        condition = F.silu(class_BC)
        if self.shared_adaln is not None:
            return self.shared_adaln(condition).view(-1, 1, 6, self.config.C)
        return condition

    def first_input(self, class_BC: Tensor) -> Tensor:
        """The start tokens with their positions: class embeddings (B, C) -> (B, l0, C)."""
        return class_BC[:, None] + self.start_embed + self._where_BLC(self._scale_index(0, class_BC), 0)

    def next_input(self, codes_BlZ: Tensor, scale: int) -> Tensor:
        """The inputs of `scale` with their positions: downsampled f_hat (B, l, Z) -> (B, l, C)."""
        start = self.schedule.bounds[scale][0]
        words_BlC = self.word_embed(codes_BlZ.to(self.word_embed.weight.dtype))
        return words_BlC + self._where_BLC(self._scale_index(scale, codes_BlZ), start)

    def modulations(self, class_BC: Tensor) -> list[Tensor]:
        """The modulation of every block. It depends on the class alone, so sampling computes it once for all scales."""
        condition = self.condition(class_BC)
        return [cast(Block, block).modulation(condition) for block in self.blocks]

    def run_scale(
        self,
        x_BlC: Tensor,
        modulations: Sequence[Tensor],
        scale: int,
        caches: Sequence[KVCache],
        run: BlockRunner = run_scale_of,
    ) -> Tensor:
        """One scale through all blocks: (B, l, C) -> (B, l, C). The caches hold the scales before it."""
        scale_index_l = self._scale_index(scale, x_BlC)
        for block, modulation, cache in zip(self.blocks, modulations, caches, strict=True):
            x_BlC = run(block, x_BlC, modulation, scale_index_l, cache)
        return x_BlC

    def new_caches(self, batch: int) -> list[KVCache]:
        """An empty key-value cache for each block. Markovian attention looks back at nothing, so it has no memory."""
        head_width = self.config.C // self.config.H
        like = self.head.weight
        length = 0 if self.config.markovian else self.schedule.num_tokens
        return [KVCache(batch, self.config.H, length, head_width, like) for _ in self.blocks]

    def logits(self, x_BLC: Tensor, class_BC: Tensor) -> Tensor:
        """The final AdaLN and the head: (B, L, C) -> (B, L, V)."""
        scale, shift = self.head_adaln(F.silu(class_BC)).view(-1, 1, 2, self.config.C).unbind(2)
        return self.head(modulate(x_BLC, scale, shift))

    def _scale_index(self, scale: int, like: Tensor) -> Tensor:
        return torch.full((self.schedule.lengths[scale],), scale, device=like.device)

    def _where_BLC(self, scale_index_L: Tensor, start: int) -> Tensor:
        """The embeddings of scale and position, from position `start` on."""
        positions = self.position_embed[:, start : start + len(scale_index_L)]
        return self.scale_embed(scale_index_L) + positions
