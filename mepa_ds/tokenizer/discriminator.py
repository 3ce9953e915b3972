"""The patch discriminator and its losses (PatchGAN, arXiv 1611.07004; hinge; LeCam, arXiv 2104.03310).

Shape legend: B batch, H = W the image's side, h = w the side of the map of logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Sequential):
    """Images (B, 3, H, W) in [-1, 1] to logits (B, 1, h, w), one a patch; large means real.

    GroupNorm in place of PatchGAN's BatchNorm: no statistics are shared between samples, so that the loss of an
    image does not depend on which images share its rank.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3):
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for index in range(1, num_layers + 1):
            wider = channels * min(2**index, 8)
            stride = 2 if index < num_layers else 1
            layers += [nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False)]
            layers += [nn.GroupNorm(32, wider), nn.LeakyReLU(0.2)]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        super().__init__(*layers)
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)

    @staticmethod
    def smallest_side(num_layers: int) -> int:
        """The smallest image that leaves one logit: the two last convolutions take 1 off each side."""
        return 3 * 2**num_layers


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss, a scalar."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The tokenizer's loss, a scalar."""
    return -fake_logits.mean()


class LeCam(nn.Module):
    """Keeps outputs for one kind of images near the running mean of outputs for the other kind (LeCam, eq. 5)."""

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("anchors", torch.zeros(2, dtype=torch.float32))
        self.anchors: Tensor

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The regularisation term, a scalar."""
        real_anchor, fake_anchor = self.anchors
        return (real_logits - fake_anchor).relu().square().mean() + (real_anchor - fake_logits).relu().square().mean()

    def update(self, means: Tensor) -> None:
        """Moves the anchors towards the step's means (2,) of the logits of real and fake images, over all ranks."""
        self.anchors.lerp_(means.float(), 1 - self.decay)
