"""Encoder and decoder of the tokenizer: the convolutional autoencoder of latent diffusion, as VAR uses it.

Parameters have latent diffusion's names, as in VAR's checkpoints.
Shape legend: B batch, C channels, H and W the sides of the map.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, beside a shortcut (1x1 where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        return self.nin_shortcut(x_BCHW) + h_BCHW


class SelfAttention(nn.Module):
    """Single-head attention over all cells of the map, added to its input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        q_BCN, k_BCN, v_BCN = self.qkv(self.norm(x_BCHW)).reshape(B, 3, C, H * W).unbind(1)
        # Plain products in VAR's layout rather than a fused kernel: bit-equal to VAR, on maps of a few hundred cells.
        weights_BNN = (torch.bmm(q_BCN.transpose(1, 2).contiguous(), k_BCN.contiguous()) * C**-0.5).softmax(2)
        h_BCN = torch.bmm(v_BCN.contiguous(), weights_BNN.transpose(1, 2).contiguous())
        return x_BCHW + self.proj_out(h_BCN.view(B, C, H, W))


class Downsample(nn.Module):
    """Halves the side; pads right and below only, as VAR does."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class ResolutionBlocks(nn.Module):
    """The blocks of one resolution, with attention after each if asked for, and the change of side after them."""

    def __init__(self, in_channels: int, channels: int, num_blocks: int, attention: bool):
        super().__init__()
        widths = [in_channels] + [channels] * num_blocks
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(SelfAttention(channels) for _ in range(num_blocks if attention else 0))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if self.attn:
                x_BCHW = self.attn[index](x_BCHW)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x_BCHW = resample(x_BCHW)
        return x_BCHW


class Middle(nn.Module):
    """Two residual blocks around attention, at the lowest resolution."""

    def __init__(self, channels: int, attention: bool):
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = SelfAttention(channels) if attention else nn.Identity()
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) to features (B, code_width, H / 2^(n-1), W / 2^(n-1)) for n multipliers."""

    def __init__(self, channels: int, multipliers: tuple[int, ...], num_blocks: int, code_width: int, attention: bool):
        super().__init__()
        widths = [channels] + [channels * multiplier for multiplier in multipliers]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level in range(len(multipliers)):
            lowest = level == len(multipliers) - 1
            blocks = ResolutionBlocks(widths[level], widths[level + 1], num_blocks, attention and lowest)
            if not lowest:
                blocks.downsample = Downsample(widths[level + 1])
            self.down.append(blocks)
        self.mid = Middle(widths[-1], attention)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], code_width, 3, padding=1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        h_BCHW = self.conv_in(images_B3HW)
        for blocks in self.down:
            h_BCHW = blocks(h_BCHW)
        return self.conv_out(F.silu(self.norm_out(self.mid(h_BCHW))))


class Decoder(nn.Module):
    """Features (B, code_width, h, w) to images (B, 3, h * 2^(n-1), w * 2^(n-1)). `up` counts from the finest side."""

    def __init__(self, channels: int, multipliers: tuple[int, ...], num_blocks: int, code_width: int, attention: bool):
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        self.conv_in = nn.Conv2d(code_width, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], attention)
        coarse_to_fine = []
        for level in reversed(range(len(multipliers))):
            lowest = level == len(multipliers) - 1
            width_in = widths[-1] if lowest else widths[level + 1]
            blocks = ResolutionBlocks(width_in, widths[level], num_blocks + 1, attention and lowest)
            if level:
                blocks.upsample = Upsample(widths[level])
            coarse_to_fine.append(blocks)
        self.up = nn.ModuleList(reversed(coarse_to_fine))
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, f_hat_BCHW: Tensor) -> Tensor:
        h_BCHW = self.mid(self.conv_in(f_hat_BCHW))
        for blocks in reversed(self.up):
            h_BCHW = blocks(h_BCHW)
        return self.conv_out(F.silu(self.norm_out(h_BCHW)))

    @property
    def last_layer(self) -> nn.Parameter:
        """Where the adversarial loss is weighed against the others (VQGAN, eq. 7)."""
        weight = self.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight
