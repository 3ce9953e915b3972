"""The multi-scale residual quantizer: latents to token maps and back (VAR, arXiv 2404.02905, algorithms 1 and 2).

Shape legend: B batch, C code width, H = W the latent grid's side, S scales, l tokens of one scale, L tokens over all
scales, V codebook size, N = B * l.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.errors import UserError
from mepa_ds.precision import full_fp32
from mepa_ds.scales import ScaleSchedule, bicubic_matrix
from mepa_ds.tokenizer.tokenizer_files import read_tokenizer
from mepa_ds.weights.directories import load_strict
from mepa_ds.weights.file_checks import check_fits


class Phi(nn.Conv2d):
    """3x3 convolution mixed with its input: `(1 - ratio) x + ratio conv(x)`. It smooths upsampled codes."""

    def __init__(self, code_width: int, ratio: float):
        super().__init__(code_width, code_width, 3, padding=1)
        self.ratio = ratio

    def forward(self, h_BCHW: Tensor) -> Tensor:
        assert self.bias is not None
        convolved_BCHW = self._conv_forward(h_BCHW, self.weight.float(), self.bias.float())
        return h_BCHW * (1 - self.ratio) + convolved_BCHW * self.ratio


class Quantized(NamedTuple):
    """The results of one pass that training needs. Losses are scalars, means over scales."""

    f_hat_BCHW: Tensor
    """The quantised latent, with the gradient passed straight through to the latent."""
    tokens_BL: Tensor
    codebook_loss: Tensor
    """Pulls codes and phi towards the latent (VAR's `mse(f_hat, sg(f))`)."""
    commitment_loss: Tensor
    """Pulls the latent towards the codes (`mse(sg(f_hat), f)`)."""
    residuals_BLC: Tensor
    """The area-downsampled residual that each token was chosen for (no gradient)."""


class MultiScaleQuantizer(nn.Module):
    """Codebook and phi convolutions. All of it runs in fp32, under autocast and with bf16 weights too: argmin decides.

    With `num_phi` = n, the phi of scale k is the one whose tick is nearest to k / (S - 1), ticks being
    `linspace(1/(2n), 1 - 1/(2n), n)`, or with thirds in place of halves for n = 4, as in VAR's released weights.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.schedule = ScaleSchedule.of(config.scales)
        self.code_width = config.code_width
        self.codebook = nn.Embedding(config.codebook_size, config.code_width)
        num_phi = (config.num_phi or self.schedule.num_scales) if config.phi_ratio else 0
        self.phi = nn.ModuleList(Phi(config.code_width, config.phi_ratio) for _ in range(num_phi))
        self._phi_of_scale = [_nearest_tick(num_phi, k, self.schedule.num_scales) for k in range(len(config.scales))]

    @classmethod
    def load(cls, path: Path | str, scales: Sequence[int] | None = None) -> MultiScaleQuantizer:
        """The quantizer alone, in evaluation mode, of a tokenizer on disk (see `Tokenizer.open`)."""
        prefix = "quantizer."
        config, state, name_in_file = read_tokenizer(path, scales, prefix=prefix)
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        check_fits(lambda: cls(config), own, str(path))
        quantizer = cls(config)
        load_strict(quantizer, own, str(path), lambda name: name_in_file(prefix + name))
        return quantizer.requires_grad_(False).eval()

    def forward(self, latent_BCHW: Tensor, num_scales_B: Tensor | None = None) -> Quantized:
        """Quantises with gradients, for training the tokenizer.

        Args:
            latent_BCHW: the encoder's output.
            num_scales_B: (B,) int, how many scales each sample may use (quantizer dropout, XQ-GAN); None: all.
        """
        with torch.autocast(latent_BCHW.device.type, enabled=False):
            latent_BCHW = latent_BCHW.float()
            target_BCHW = latent_BCHW.detach()
            f_hat_BCHW = torch.zeros_like(target_BCHW)
            codebook_loss = commitment_loss = target_BCHW.new_zeros(())
            tokens, residuals = [], []
            for k in range(self.schedule.num_scales):
                residual_BlC = self._down((target_BCHW - f_hat_BCHW).detach(), k)
                tokens_Bl = self._nearest(residual_BlC)
                h_BCHW = self._up(self.codebook(tokens_Bl), k)
                if num_scales_B is not None:
                    h_BCHW = h_BCHW * (num_scales_B > k).view(-1, 1, 1, 1)
                f_hat_BCHW = f_hat_BCHW + h_BCHW
                codebook_loss = codebook_loss + F.mse_loss(f_hat_BCHW, target_BCHW)
                commitment_loss = commitment_loss + F.mse_loss(latent_BCHW, f_hat_BCHW.detach())
                tokens.append(tokens_Bl)
                residuals.append(residual_BlC)
            S = self.schedule.num_scales
            return Quantized(
                latent_BCHW + (f_hat_BCHW - latent_BCHW).detach(),
                torch.cat(tokens, dim=1),
                codebook_loss / S,
                commitment_loss / S,
                torch.cat(residuals, dim=1),
            )

    @torch.no_grad()
    def tokens_of(self, latent_BCHW: Tensor) -> Tensor:
        """Quantises a latent (B, C, H, W) to tokens (B, L) int64.

        The operations and their order are VAR's: another grouping of the same sums can flip an argmin.
        """
        with torch.autocast(latent_BCHW.device.type, enabled=False), full_fp32():
            residual_BCHW = latent_BCHW.float().clone()
            tokens = []
            for k in range(self.schedule.num_scales):
                tokens_Bl = self._nearest(self._down(residual_BCHW, k))
                residual_BCHW -= self._up(self.codebook(tokens_Bl), k)
                tokens.append(tokens_Bl)
        return torch.cat(tokens, dim=1)

    def empty_f_hat(self, batch_size: int) -> Tensor:
        """(B, C, H, W) of zeros: where decoding and sampling begin."""
        side = self.schedule.grid_side
        return self.codebook.weight.new_zeros(batch_size, self.code_width, side, side, dtype=torch.float32)

    def add_scale(self, f_hat_BCHW: Tensor, tokens_Bl: Tensor, scale_index: int) -> Tensor:
        """f_hat with the tokens (B, l) of one scale added."""
        return self.add_codes(f_hat_BCHW, self.codebook(tokens_Bl), scale_index)

    def add_codes(self, f_hat_BCHW: Tensor, codes_BlC: Tensor, scale_index: int) -> Tensor:
        """The same for codes (B, l, C), which may be mixtures of codebook entries (smooth sampling)."""
        with torch.autocast(f_hat_BCHW.device.type, enabled=False), full_fp32():
            return f_hat_BCHW + self._up(codes_BlC, scale_index)

    def next_input(self, f_hat_BCHW: Tensor, scale_index: int) -> Tensor:
        """The transformer's input (B, l', C) for scale `scale_index + 1`: f_hat area-downsampled to its side."""
        return self._down(f_hat_BCHW, scale_index + 1)

    @torch.no_grad()
    def f_hat_of(self, tokens_BL: Tensor) -> Tensor:
        """The quantised latent (B, C, H, W) that tokens (B, L) stand for."""
        for f_hat_BCHW in self.f_hats_of(tokens_BL):
            last_BCHW = f_hat_BCHW
        return last_BCHW

    @torch.no_grad()
    def f_hats_of(self, tokens_BL: Tensor) -> Iterator[Tensor]:
        """The sum (B, C, H, W) after each scale."""
        tokens_BL = self._checked(tokens_BL)
        f_hat_BCHW = self.empty_f_hat(len(tokens_BL))
        for k, tokens_Bl in enumerate(self.schedule.split(tokens_BL)):
            f_hat_BCHW = self.add_scale(f_hat_BCHW, tokens_Bl, k)
            yield f_hat_BCHW

    @torch.no_grad()
    def inputs_from_tokens(self, tokens_BL: Tensor) -> Tensor:
        """The teacher-forced input (B, L - 1, C) fp32 for scales 2..S; scale 1 starts from the class embedding.

        L - 1 because the first map has one token when the schedule starts at side 1; in general it is L less the
        tokens of the first scale.
        """
        tokens_BL = self._checked(tokens_BL)
        f_hat_BCHW = self.empty_f_hat(len(tokens_BL))
        inputs = [f_hat_BCHW.new_empty(len(tokens_BL), 0, self.code_width)]
        with torch.autocast(f_hat_BCHW.device.type, enabled=False), full_fp32():
            for k, tokens_Bl in enumerate(self.schedule.split(tokens_BL)[:-1]):
                # By a matrix, unlike VAR's own order of operations, which decides tokens: no token is chosen here.
                h_BCHW = _enlarged(self.codebook(tokens_Bl).float(), self.schedule.sides[k], self.schedule.grid_side)
                f_hat_BCHW = f_hat_BCHW + self._smoothed(h_BCHW, k)
                inputs.append(self.next_input(f_hat_BCHW, k))
        return torch.cat(inputs, dim=1)

    def _checked(self, tokens_BL: Tensor) -> Tensor:
        """Tokens of any integer type as int64."""
        if tokens_BL.ndim != 2 or tokens_BL.shape[1] != self.schedule.num_tokens:
            raise UserError(
                f"tokens have shape {tuple(tokens_BL.shape)}, but scales {list(self.schedule.sides)} "
                f"take (batch, {self.schedule.num_tokens})"
            )
        if tokens_BL.is_floating_point() or tokens_BL.dtype == torch.bool:
            raise UserError(f"tokens: expected integers such as int64, got {str(tokens_BL.dtype)[6:]}")
        tokens_BL = tokens_BL.to(torch.int64)
        # On a GPU the embedding's own assert serves: reading the range would wait for all that was queued.
        if tokens_BL.numel() and not tokens_BL.is_cuda:
            low, high = (int(value) for value in tokens_BL.aminmax())
            if low < 0 or high >= self.codebook.num_embeddings:
                raise UserError(
                    f"tokens: expected 0..{self.codebook.num_embeddings - 1}, the codebook's, got "
                    f"{low if low < 0 else high}"
                )
        return tokens_BL

    def _nearest(self, residual_BlC: Tensor) -> Tensor:
        """(B, l) int64: the code nearest in L2, by |z|^2 + |e|^2 - 2 z e in VAR's order of operations."""
        residual_NC, codebook_VC = residual_BlC.flatten(0, 1), self.codebook.weight.detach().float()
        distance_NV = residual_NC.square().sum(1, keepdim=True) + codebook_VC.square().sum(1)
        distance_NV.addmm_(residual_NC, codebook_VC.T, alpha=-2)
        return distance_NV.argmin(1).view(residual_BlC.shape[:2])

    def _down(self, f_BCHW: Tensor, scale_index: int) -> Tensor:
        """(B, l, C): the map averaged down to the side of a scale, in row-major order."""
        if scale_index < self.schedule.num_scales - 1:
            side = self.schedule.sides[scale_index]
            f_BCHW = F.interpolate(f_BCHW, size=(side, side), mode="area")
        return f_BCHW.flatten(2).transpose(1, 2)

    def _up(self, codes_BlC: Tensor, scale_index: int) -> Tensor:
        """(B, C, H, W): codes of a scale, bicubically upsampled to the grid, through phi."""
        side, grid_side = self.schedule.sides[scale_index], self.schedule.grid_side
        h_BCHW = codes_BlC.float().transpose(1, 2).unflatten(2, (side, side))
        if side != grid_side:
            h_BCHW = F.interpolate(h_BCHW, size=(grid_side, grid_side), mode="bicubic")
        return self._smoothed(h_BCHW, scale_index)

    def _smoothed(self, h_BCHW: Tensor, scale_index: int) -> Tensor:
        """Through the scale's phi, if there are any."""
        return self.phi[self._phi_of_scale[scale_index]](h_BCHW.contiguous()) if self.phi else h_BCHW


def _enlarged(codes_BlC: Tensor, side: int, grid_side: int) -> Tensor:
    """Codes of a scale on the grid, bicubically, by a product with a fixed matrix: (B, C, H, W)."""
    if side == grid_side:
        grid_BCN = codes_BlC.transpose(1, 2)
    else:
        grid_BCN = codes_BlC.transpose(1, 2) @ bicubic_matrix(side, grid_side, codes_BlC.device).T
    return grid_BCN.unflatten(2, (grid_side, grid_side))


def _nearest_tick(num_phi: int, scale_index: int, num_scales: int) -> int:
    """Which phi a scale uses. In NumPy, as in VAR: some scales lie halfway between ticks, and rounding decides."""
    if num_phi < 2:
        return 0
    edge = 1 / (3 if num_phi == 4 else 2) / num_phi
    ticks = np.linspace(edge, 1 - edge, num_phi)
    return int(np.argmin(np.abs(ticks - scale_index / max(num_scales - 1, 1))))
