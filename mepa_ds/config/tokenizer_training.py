"""The recipe of a tokenizer's training: everything that `mepa train-tokenizer` reads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from mepa_ds.config.base import Section
from mepa_ds.config.optim import OptimConfig
from mepa_ds.config.pretrain import TrainConfig
from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.config.values import PositiveInt, RemoteScheme, UserPath
from mepa_ds.errors import UserError

NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class TokenizerDataConfig(Section):
    """Shards of images."""

    images: UserPath
    """Training images: a directory of shards, ours or any WebDataset."""
    heldout_images: UserPath | None = None
    """Held-out images for PSNR and codebook use; null: no evaluation."""
    on_damaged: Literal["stop", "skip"] = "stop"
    """A training image that cannot be read: end the run with its name, or put the next one in its place and count."""
    remote_schemes: tuple[RemoteScheme, ...] = ()
    """What remote.json of a set may name beside the web and stores; `pipe` runs its shell commands. Only for sets that
    you trust."""
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes a rank; the order of samples does not depend on it."""


class PerceptualConfig(Section):
    """LPIPS (package `lpips`, installed with the extra `perceptual`)."""

    weight: NonNegative = 1.0
    """Factor of the loss."""
    network: Literal["vgg", "alex"] = "vgg"
    """Backbone whose features are compared."""
    backbone_weights: UserPath
    """State dict of torchvision's vgg16 or alexnet, such as vgg16-397923af.pth; nothing is downloaded."""


class AdversarialConfig(Section):
    """Patch discriminator with hinge loss (VQGAN, arXiv 2012.09841)."""

    weight: NonNegative = 0.5
    """Factor of the generator's loss."""
    adaptive: bool = True
    """Also scale it so that its gradient at the decoder's last layer is as large as the reconstruction's."""
    start_step: Annotated[int, Field(ge=0)] = 0
    """Step from which the discriminator trains and counts."""
    lr_factor: Annotated[float, Field(gt=0)] = 1.0
    """The discriminator's learning rate as a multiple of the tokenizer's."""
    channels: PositiveInt = 64
    """Width of its first convolution."""
    num_layers: PositiveInt = 3
    """Convolutions that halve the side; a logit sees a patch of 70 pixels for 3."""
    lecam: NonNegative = 0.0
    """Weight of LeCam regularisation (arXiv 2104.03310) of the discriminator."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.channels % 32:
            raise ValueError(f"channels must be a multiple of 32 (GroupNorm has 32 groups), got {self.channels}")
        return self


class LossConfig(Section):
    """Terms of the tokenizer's loss."""

    reconstruction: NonNegative = 1.0
    """Factor of the mean squared error of images in [-1, 1]."""
    codebook: NonNegative = 1.0
    """Factor of the loss that pulls codes towards the latent, a mean over scales."""
    commitment: NonNegative = 0.25
    """Factor of the loss that pulls the latent towards the codes (VAR's beta)."""
    perceptual: PerceptualConfig | None = None
    """LPIPS"""
    adversarial: AdversarialConfig | None = None
    """Discriminator"""


class CodebookConfig(Section):
    """Use of the codes."""

    usage_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay a step of the running frequency of each code at each scale."""
    revive_every: Annotated[int, Field(ge=0)] = 500
    """Steps between revivals: dead codes move onto random residuals of the batch; 0: never."""
    revive_below: NonNegative = 0.01
    """A code is dead when its running frequency is below this share of the uniform one at every scale. A revived code
    that finds no token is dead again after log(revive_below) / log(usage_decay) steps, 458 by default."""
    dropout: Fraction = 0.0
    """Share of samples that use only the first scales (quantizer dropout, XQ-GAN)."""
    dropout_from: PositiveInt = 3
    """Scales that such a sample uses at least; 3 means that the 4th is the first that may be left out."""


class TokenizerOptimConfig(OptimConfig):
    """AdamW; the keys are pretraining's, with other defaults."""

    weight_decay: NonNegative = 0.0
    """Decay of matrices; biases, norms and the codebook have none."""
    schedule: Literal["lin0", "cosine", "constant"] = "cosine"
    """After the warm-up. lin0: flat for 5 %, then linear to final_lr; cosine; constant."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; null: no clipping."""


class TokenizerLogConfig(Section):
    """What is written, and when (in steps)."""

    every: PositiveInt = 50
    """A record in metrics.jsonl."""
    evaluate_every: PositiveInt = 1000
    """Held-out PSNR and codebook use, and a grid of reconstructions."""
    evaluate_images: PositiveInt = 10000
    """Held-out images that are evaluated, at most."""
    checkpoint_every: PositiveInt = 1000
    """A checkpoint that any number of ranks can resume from."""


class TokenizerTrainingConfig(Section):
    """A whole run."""

    output_dir: UserPath
    """Where the tokenizer, metrics.jsonl and reconstructions go; running again resumes from there."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial weights, order of samples and quantizer dropout."""
    start_from: UserPath | None = None
    """Weights to begin with: a saved tokenizer's directory, or a VAR tokenizer such as vae_ch160v4096z32.pth."""
    data: TokenizerDataConfig
    """Shards"""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Architecture"""
    loss: LossConfig = LossConfig()
    """Losses"""
    codebook: CodebookConfig = CodebookConfig()
    """Codebook"""
    optim: TokenizerOptimConfig = TokenizerOptimConfig()
    """Optimizer"""
    train: TrainConfig
    """Length and batch"""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Type of activations (autocast); weights, quantizer and losses are fp32 always."""
    log: TokenizerLogConfig = TokenizerLogConfig()
    """Records, evaluation, checkpoints"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.codebook.dropout and self.codebook.dropout_from >= len(self.tokenizer.scales):
            raise ValueError(
                f"codebook.dropout_from ({self.codebook.dropout_from}) must be below the number of scales "
                f"({len(self.tokenizer.scales)}), or there is nothing to leave out"
            )
        return self

    def check_world(self, world_size: int) -> None:
        """Raises UserError when the run cannot be spread over this many ranks."""
        batch, accumulation = self.train.global_batch, self.train.accumulation
        if batch % (accumulation * world_size):
            raise UserError(
                f"train.global_batch ({batch}) must be a multiple of {world_size} ranks x train.accumulation "
                f"({accumulation}) = {world_size * accumulation}"
            )
