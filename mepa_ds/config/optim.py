"""The optimizer and its learning-rate schedule, in recipes of both training loops."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from mepa_ds.config.base import Section

Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW with VAR's settings."""

    base_lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate at a global batch of 256; it grows linearly with the batch."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decay of matrices; biases, embeddings of position and scale, and temperatures have none (VAR)."""
    schedule: Literal["lin0", "cosine", "constant", "wsd"] = "lin0"
    """After the warm-up. lin0: flat for 5 %, then linear to final_lr; cosine; constant; wsd: constant, and over the
    last steps (cooldown) down to final_lr by 1 - sqrt."""
    cooldown: Fraction = 0.2
    """Share of all steps, at their end, in which wsd lowers the rate; 0: none."""
    warmup: Fraction = 0.02
    """Share of all steps with a linearly growing rate."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """The same as a number of steps, in place of warmup: runs of other lengths then warm up alike. null: warmup."""
    warmup_start: Fraction = 0.005
    """Rate of the first step as a share of the peak."""
    final_lr: Fraction = 0.1
    """Rate of the last step as a share of the peak (VAR's wpe)."""
    clip: Annotated[float, Field(gt=0)] | None = 2.0
    """Largest global gradient norm; null: no clipping."""

    @model_validator(mode="after")
    def _check_phases(self) -> Self:
        if self.schedule == "wsd" and self.warmup_steps is None and self.warmup + self.cooldown > 1:
            raise ValueError(
                f"warmup ({self.warmup:g}) and cooldown ({self.cooldown:g}) are shares of the same steps: with "
                "schedule wsd their sum is at most 1"
            )
        return self


class PretrainOptimConfig(OptimConfig):
    """AdamW with VAR's settings."""

    freeze: tuple[str, ...] = ()
    """Weights that stay as they are, by patterns of their names in exported files: `blocks.[0-7].*`,
    `blocks.*.attention.*`, `projector.*`. They cost as much as others; a later start may thaw them."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an average of the weights, exported to <output_dir>/last_ema; null: none (VAR, MEPA)."""
    mup_base_width: Annotated[int, Field(gt=0)] | None = None
    """muP: base_lr was tuned at this model.width, and rates, decay and initial weights of matrices scale from there to
    the model's own; keep model.width / num_heads fixed. null: the standard parametrisation."""
