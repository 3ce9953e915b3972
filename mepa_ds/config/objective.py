"""What is minimised: cross-entropy, semantic alignment, expert balance."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from mepa_ds.config.base import Section
from mepa_ds.config.values import PositiveInt

Weight = Annotated[float, Field(ge=0)]


class AlignmentConfig(Section):
    """Semantic guidance (MEPA): hidden states follow a frozen teacher's patch features. Training only."""

    weight: Weight = 0.5
    """Weight of L_SG."""
    until: Annotated[float, Field(gt=0, le=1)] | None = None
    """The weight falls linearly from its value at the first step to 0 at this share of the steps; null: constant."""
    scales: tuple[PositiveInt, ...] = (5, 6, 7)
    """F: 1-based scales whose aggregate is compared with the teacher (SG-M of the paper)."""
    block: Annotated[int, Field(ge=0)] | None = None
    """0-based block whose output is aligned; null: 8 when depth >= 16, else depth // 2."""
    projector_hidden: PositiveInt = 2048
    """Hidden width of the projector MLP."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.scales:
            raise ValueError("scales must name at least one scale (1-based)")
        return self

    def block_of(self, depth: int) -> int:
        if self.block is not None:
            return self.block
        return 8 if depth >= 16 else depth // 2


class ObjectiveConfig(Section):
    """total = ce_weight CE + alignment.weight L_SG + sum over MoE layers (balance_weight L_b + router_z_weight L_z)"""

    ce_weight: Weight = 1.0
    """Weight of the cross-entropy."""
    ce_over: Literal["tokens", "scales", "log_normal"] = "tokens"
    """What CE is a mean over: `tokens` (the finest scale has more of them than all others together), `scales` (each
    counts the same), or scales weighted by `log_normal`, HMAR's weights, which are largest for the middle ones
    (arXiv 2506.04421). Records and scores always have the mean over tokens."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each token's target that is spread evenly over the codebook. Records and scores have CE without it."""
    alignment: AlignmentConfig | None = AlignmentConfig()
    """Semantic guidance"""
    balance_weight: Weight = 0.01
    """alpha, weight of the load-balance loss of each MoE layer."""
    balance_over: Literal["micro_batch", "step"] = "micro_batch"
    """Expert shares f_e count one micro-batch of all ranks, or also the step's micro-batches before it. `step` is for
    small micro-batches: balance over few images keeps experts from specialising (arXiv 2501.11873)."""
    router_z_weight: Weight = 0.0
    """Weight of the router z-loss of each MoE layer (arXiv 2202.08906 uses 1e-3)."""
