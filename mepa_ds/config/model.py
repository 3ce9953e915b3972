"""Architecture of the next-scale transformer. Stored as `config.json` beside its weights."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from mepa_ds.config.base import Section
from mepa_ds.config.values import PositiveInt
from mepa_ds.scales import ScaleSchedule

# Not strict as a whole: a preset hands over Python lists (its items stay strict).
Sides = Annotated[tuple[PositiveInt, ...], Field(strict=False)]

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


class MoEConfig(Section):
    """Scale-aware token-routed mixture of experts in place of the FFN (MEPA, arXiv 2607.00371)."""

    router: Literal["stmoe", "smoe", "token", "expert_choice"] = "stmoe"
    """stmoe: token + scale embedding; smoe: scale only; token: no scale; expert_choice: experts pick tokens, for the
    ablation only: not causal (a choice depends on finer scales and other images), so sampling differs from training."""
    num_experts: PositiveInt = 8
    """E, the number of routed experts."""
    top_k: PositiveInt = 2
    """K, routed experts a token."""
    renormalize: bool = False
    """Divide the chosen experts' probabilities by their sum."""
    shared_expert: bool = True
    """One more expert that sees every token."""
    expert_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of every expert as a multiple of C, rounded to a multiple of 64 (of 8 below 64); equal to
    ffn_ratio: exactly the dense FFN's."""
    every: PositiveInt = 1
    """Every n-th block is MoE, the others keep a dense FFN; the last block of each n is the MoE one."""
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    """In training, an expert takes at most this multiple of T K / E pairs of a rank; null: dropless."""
    bias_rate: Annotated[float, Field(ge=0)] = 0.0
    """Step of loss-free balancing by a bias on the choice (arXiv 2408.15664 uses 1e-3); 0: off."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) must not exceed num_experts ({self.num_experts})")
        if self.renormalize and self.top_k == 1:
            raise ValueError(
                "renormalize with top_k 1 makes every weight 1, and the router learns nothing from the loss"
            )
        if self.router == "expert_choice" and (self.capacity_factor or self.bias_rate or self.renormalize):
            raise ValueError("router expert_choice balances by itself: leave capacity_factor, bias_rate, renormalize")
        return self


class ModelConfig(Section):
    """Defaults are VAR-d16 at 256 px. Width and heads follow from the depth unless given (C = 64 d, d heads)."""

    preset: str | None = None
    """A named size that fills in every key not given: var-d16, mepa-d16, mepa-d16-iso, ... (any depth)."""
    depth: PositiveInt = 16
    """Number of blocks."""
    width: PositiveInt | None = None
    """C, the residual stream's width; null: 64 x depth."""
    num_heads: PositiveInt | None = None
    """H; null: depth."""
    ffn_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of a dense FFN as a multiple of C."""
    moe: MoEConfig | None = None
    """Mixture of experts"""
    num_classes: PositiveInt = 1000
    """Classes of the data set; the label num_classes itself means "no class" for guidance."""
    scales: Sides = SCALES_256
    """Sides of the token maps; must be the tokenizer's."""
    codebook_size: PositiveInt = 4096
    """V; must be the tokenizer's."""
    code_width: PositiveInt = 32
    """Channels of the tokenizer's codes."""
    shared_adaln: bool = False
    """One AdaLN projection for all blocks plus a learned offset each (VAR-d36)."""
    qk_norm: bool = True
    """L2-normalised queries and keys with a learned temperature per head."""
    markovian: bool = False
    """Each scale attends to itself alone (HMAR, arXiv 2506.04421): it sees coarser scales by their sum, which is its
    input. false: to all coarser scales, too (VAR)."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Stochastic depth of the last block, growing linearly from 0; null: 0.1 x depth / 24."""
    class_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of training labels replaced by "no class"."""
    adaln_init: float = 0.5
    """Scale of the initial AdaLN projections (shift and scale rows, and the head's)."""
    adaln_gamma_init: float = 1e-3
    """Scale of the initial AdaLN projections' residual gates."""
    head_init: float = 0.02
    """Scale of the initial head weights."""

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("preset"), str):
            return data
        merged = dict(preset_values(data["preset"]))
        for key, value in data.items():
            if key == "moe" and isinstance(value, dict) and isinstance(merged.get("moe"), dict):
                value = {**merged["moe"], **value}
            merged[key] = value
        return merged

    @model_validator(mode="after")
    def _check(self) -> Self:
        ScaleSchedule.of(self.scales)
        if self.C % self.H:
            raise ValueError(f"width ({self.C}) must be divisible by num_heads ({self.H})")
        if self.moe and self.moe.every > self.depth:
            raise ValueError(f"moe.every ({self.moe.every}) exceeds depth ({self.depth}): no block would be MoE")
        return self

    @property
    def C(self) -> int:
        """Width of the residual stream."""
        return self.width if self.width is not None else 64 * self.depth

    @property
    def H(self) -> int:
        """Number of attention heads."""
        return self.num_heads if self.num_heads is not None else self.depth

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule.of(self.scales)

    @property
    def drop_path_rate(self) -> float:
        return self.drop_path if self.drop_path is not None else 0.1 * self.depth / 24

    @property
    def dense_hidden(self) -> int:
        """Hidden width of a dense FFN."""
        return round(self.ffn_ratio * self.C)

    @property
    def expert_hidden(self) -> int:
        """Hidden width of one expert."""
        assert self.moe is not None
        if self.moe.expert_ratio == self.ffn_ratio:  # upcycled copies must be whole
            return self.dense_hidden
        return round_hidden(self.moe.expert_ratio * self.C)

    def is_moe_block(self, index: int) -> bool:
        """Whether block `index` (0-based) has experts."""
        return self.moe is not None and index % self.moe.every == self.moe.every - 1


def round_hidden(hidden: float) -> int:
    """Rounds a hidden width to a multiple of 64 (whole tiles for a GPU's matrix units), of 8 if it is below 64."""
    step = 64 if hidden >= 64 else 8
    return max(step, round(hidden / step) * step)


_PRESET = re.compile(r"(var|mepa)-d(\d+)(-iso)?(-512)?")


def preset_values(name: str) -> dict[str, Any]:
    """The keys that a preset sets. Raises ValueError for a name that is none.

    `var-dN` dense; `mepa-dN` 8 routed + 1 shared expert of hidden 4C, top-2; `mepa-dN-iso` the same with hidden
    4C/3, so that top-2 + shared cost the dense FFN's FLOPs; `-512` the 512 px schedule (with shared AdaLN for
    depth 36, as VAR's). Residual gates start the smaller the deeper the model is.
    """
    match = _PRESET.fullmatch(name)
    if match is None or (match[1] == "var" and match[3]):
        raise ValueError(f"no preset {name!r}; presets are var-dN, mepa-dN and mepa-dN-iso, each also with -512")
    depth = int(match[2])
    values: dict[str, Any] = {"depth": depth, "adaln_gamma_init": _gamma_init(depth)}
    if match[1] == "mepa":
        values["moe"] = {"expert_ratio": 4 / 3} if match[3] else {}
    if match[4]:
        values |= {"scales": list(SCALES_512), "shared_adaln": depth >= 36}
    return values


def _gamma_init(depth: int) -> float:
    """VAR's `--alng`: 1e-3 for d16 and d20, 1e-4 for d24, 1e-5 for d30, 5e-6 for d36."""
    for limit, value in ((24, 1e-3), (30, 1e-4), (36, 1e-5)):
        if depth < limit:
            return value
    return 5e-6
