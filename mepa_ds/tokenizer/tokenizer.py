"""The tokenizer: images to token maps and back.

Shape legend: B batch, H = W the image's side, L tokens over all scales, C code width, h = w the latent grid's side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.errors import UserError
from mepa_ds.files import identity_of_weights
from mepa_ds.images.pictures import check_floats
from mepa_ds.precision import full_fp32
from mepa_ds.scales import ScaleSchedule
from mepa_ds.tokenizer.layers import Decoder, Encoder
from mepa_ds.tokenizer.quantizer import MultiScaleQuantizer
from mepa_ds.tokenizer.tokenizer_files import KIND, convert_var, read_tokenizer
from mepa_ds.weights.directories import load_strict, read_pretrained, save_pretrained
from mepa_ds.weights.file_checks import check_fits


class Tokenizer(nn.Module):
    """Multi-scale residual VQVAE with VAR's architecture (arXiv 2404.02905, section 3.2), at any size."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.schedule = ScaleSchedule.of(config.scales)
        width = config.code_width
        sizes = (config.channels, config.channel_multipliers, config.num_res_blocks, width, config.attention)
        self.encoder = Encoder(*sizes)
        self.to_latent = nn.Conv2d(width, width, 3, padding=1)
        self.quantizer = MultiScaleQuantizer(config)
        self.from_latent = nn.Conv2d(width, width, 3, padding=1)
        self.decoder = Decoder(*sizes)

    @classmethod
    def open(
        cls, path: Path | str, scales: Sequence[int] | None = None, *, phi_ratio: float | None = None
    ) -> Tokenizer:
        """Opens what the path holds: a directory of ours (`load`), or VAR's tokenizer (`from_var`).

        Raises:
            UserError: it holds neither, or `phi_ratio` is not the one in the settings beside the weights.
        """
        config, state, name_in_file = read_tokenizer(path, scales, phi_ratio)
        check_fits(partial(cls, config), state, str(path))
        tokenizer = cls(config)
        load_strict(tokenizer, state, str(path), name_in_file)
        return tokenizer.requires_grad_(False).eval()

    @classmethod
    def from_var(
        cls,
        source: Path | str | Mapping[str, Tensor],
        scales: Sequence[int] | None = None,
        *,
        phi_ratio: float | None = None,
    ) -> Tokenizer:
        """Loads VAR's tokenizer, strictly, in evaluation mode without gradients.

        Args:
            source: `vae_ch160v4096z32.pth`, another file with the same keys, a checkpoint of VAR's training, or the
                state dict itself.
            scales: sides of the token maps; None: the sides in the file's settings, or VAR's ten for 256 x 256. The
                same weights serve 512 x 512 with (1, 2, 3, 4, 6, 9, 13, 18, 24, 32).
            phi_ratio: share of phi's convolution, which no tensor shows; None: the one in the settings, or VAR's 0.5.

        Raises:
            UserError: not such a checkpoint, keys or shapes that do not fit, a pickle with more than tensors.
        """
        config, state, name_in_file = convert_var(source, scales, phi_ratio)
        where = "the state dict" if isinstance(source, Mapping) else str(source)
        check_fits(partial(cls, config), state, where)
        tokenizer = cls(config)
        load_strict(tokenizer, state, where, name_in_file)
        return tokenizer.requires_grad_(False).eval()

    @classmethod
    def load(cls, directory: Path | str, scales: Sequence[int] | None = None) -> Tokenizer:
        """Loads a directory of `save_pretrained`, in evaluation mode without gradients.

        Args:
            scales: another schedule for the same weights; None: the one they were trained with.
        """
        config, state = read_pretrained(directory, TokenizerConfig, KIND)
        config = config.with_scales(scales, str(directory))
        check_fits(partial(cls, config), state, str(directory))
        tokenizer = cls(config)
        load_strict(tokenizer, state, str(directory))
        return tokenizer.requires_grad_(False).eval()

    def save_pretrained(self, directory: Path | str, max_shard_bytes: int = 5 * 10**9) -> None:
        """Writes `config.json` and safetensors weights in Hugging Face's layout."""
        save_pretrained(directory, self.config, self.state_dict(), KIND, max_shard_bytes)

    @cached_property
    def identity(self) -> str:
        """16 hex digits of a hash of weights and scales. Token sets store it, and are refused with another tokenizer.

        Computed once: weights that change afterwards (training) must be saved and loaded first.
        """
        scales = torch.tensor(self.config.scales, dtype=torch.int64)
        return identity_of_weights({**self.state_dict(), "scales": scales})

    def latent(self, images_B3HW: Tensor) -> Tensor:
        """The encoder's output (B, C, h, w) before quantisation.

        Raises:
            UserError: images of another shape or side than the scales stand for, or no floats.
        """
        side = self.config.image_side
        if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3:
            raise UserError(f"images have shape {tuple(images_B3HW.shape)}, expected (batch, 3, {side}, {side})")
        check_floats(images_B3HW)
        if tuple(images_B3HW.shape[2:]) != (side, side):
            height, width = images_B3HW.shape[-2:]
            down = self.config.downsampling
            raise UserError(
                f"images have shape {tuple(images_B3HW.shape)}, so their latent is {height // down} x {width // down}, "
                f"but the last of the scales {list(self.config.scales)} is {self.schedule.grid_side}: "
                f"give (batch, 3, {side}, {side}) images, or scales that end in the latent's side"
            )
        return self.to_latent(self.encoder(images_B3HW.to(self.to_latent.weight.dtype)))

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Images (B, 3, H, H) in [-1, 1] to tokens (B, L) int64, scale after scale, each map row by row.

        It runs in the type of the weights, without the caller's autocast, since others read these tokens.
        """
        with torch.autocast(images_B3HW.device.type, enabled=False), full_fp32():
            return self.quantizer.tokens_of(self.latent(images_B3HW))

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Tokens (B, L) to images (B, 3, H, H) in [-1, 1], in the type of the weights."""
        return self.decode_f_hat(self.quantizer.f_hat_of(tokens_BL))

    @torch.no_grad()
    def decode_f_hat(self, f_hat_BChw: Tensor) -> Tensor:
        """The quantised latent (B, C, h, w) to images (B, 3, H, H) in [-1, 1]."""
        return self.reconstruct(f_hat_BChw).clamp(-1, 1)

    @torch.no_grad()
    def decode_scales(self, tokens_BL: Tensor) -> Iterator[Tensor]:
        """The images (B, 3, H, H) in [-1, 1] of the token maps up to each scale; the last is `decode`'s."""
        for f_hat_BChw in self.quantizer.f_hats_of(tokens_BL):
            yield self.decode_f_hat(f_hat_BChw)

    def reconstruct(self, f_hat_BChw: Tensor) -> Tensor:
        """The decoder with gradients and without clamping, for training."""
        return self.decoder(self.from_latent(f_hat_BChw.to(self.from_latent.weight.dtype)))

    def inputs_from_tokens(self, tokens_BL: Tensor) -> Tensor:
        """Tokens (B, L) to the transformer's teacher-forced input (B, L - 1, C)."""
        return self.quantizer.inputs_from_tokens(tokens_BL)


def identity_of(path: Path | str, scales: Sequence[int] | None = None) -> str:
    """The identity of a tokenizer on disk (see `Tokenizer.open`). Reads all its weights."""
    return Tokenizer.open(path, scales).identity
