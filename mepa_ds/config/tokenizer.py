"""Architecture of the multi-scale residual VQVAE. Stored as `config.json` beside its weights."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, model_validator
from typing_extensions import Self

from mepa_ds.config.base import Section, validate
from mepa_ds.config.values import PositiveInt
from mepa_ds.errors import UserError
from mepa_ds.scales import ScaleSchedule


def checked_sides(scales: Sequence[int], where: str) -> list[int]:
    """Scales that a caller gave, as plain integers.

    Raises:
        UserError: not a sequence of integers. (Whether they make a schedule is `ScaleSchedule`'s to say.)
    """
    try:
        return [operator.index(side) for side in scales]
    except TypeError as error:
        raise UserError(f"{where}: scales: expected sides such as (1, 2, 3, 4), got {scales!r}") from error


class TokenizerConfig(Section):
    """Defaults are VAR's `vae_ch160v4096z32`."""

    scales: tuple[PositiveInt, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Sides of the token maps, coarse to fine; the last is the latent grid's side."""
    codebook_size: PositiveInt = 4096
    """V, the number of codes, shared by all scales."""
    code_width: PositiveInt = 32
    """Channels of a code and of the latent grid."""
    channels: PositiveInt = 160
    """Width of the first convolution."""
    channel_multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=16)] = (1, 1, 2, 2, 4)
    """Width of each resolution as a multiple of `channels`; every step but the last halves the side."""
    num_res_blocks: PositiveInt = 2
    """Residual blocks a resolution (the decoder has one more)."""
    num_phi: Annotated[int, Field(ge=0)] = 4
    """Residual convolutions after upsampling: 0 = one for each scale, 1 = one for all scales, n = n shared."""
    phi_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    """How much of phi's convolution replaces its input."""
    attention: bool = True
    """Self-attention at the lowest resolution."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        ScaleSchedule.of(self.scales)
        if self.channels % 32:
            raise ValueError(f"channels must be a multiple of 32 (GroupNorm has 32 groups), got {self.channels}")
        return self

    def with_scales(self, scales: Sequence[int] | None, where: str) -> TokenizerConfig:
        """The same weights for another schedule (None: this one). `where` begins the message of a UserError."""
        if scales is None or (sides := checked_sides(scales, where)) == list(self.scales):
            return self
        # One phi a scale was trained for the old schedule: the new one shares them by their ticks.
        changed = {**self.model_dump(), "scales": sides, "num_phi": self.num_phi or len(self.scales)}
        return validate(TokenizerConfig, changed, where)

    @property
    def downsampling(self) -> int:
        """Image pixels a latent cell, along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def image_side(self) -> int:
        return self.downsampling * self.scales[-1]
