"""The adversarial part of the tokenizer's training: the discriminator, its optimizer, and the weight of its loss.

Shape legend: B batch, H = W side of the image, h = w side of the map of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mepa_ds.config.tokenizer_training import AdversarialConfig, TokenizerOptimConfig
from mepa_ds.distributed import mean_over_ranks
from mepa_ds.tokenizer.discriminator import LeCam, PatchDiscriminator, generator_loss, hinge_loss
from mepa_ds.train_tokenizer.reduce import average_gradients

_MAX_ADAPTIVE = 1e4


class Adversary:
    """Trains the discriminator. One step calls `generator_term` and `accumulate` per micro-batch, then `step` once."""

    def __init__(self, config: AdversarialConfig, optim: TokenizerOptimConfig, device: torch.device):
        self.config, self.clip = config, optim.clip
        self.discriminator = PatchDiscriminator(config.channels, config.num_layers).to(device)
        self.lecam = LeCam().to(device)
        self.optimizer = build_optimizer(self.discriminator, optim)
        self._logit_means = torch.zeros(2, device=device)

    def generator_term(
        self, reconstruction_B3HW: Tensor, reconstruction_loss: Tensor, last_layer: nn.Parameter
    ) -> tuple[Tensor, Tensor]:
        """Returns (the weighted loss of the tokenizer, the adaptive weight), both scalars.

        Collective when the weight is adaptive, because it compares the mean gradients over ranks of one micro-batch.
        """
        loss = generator_loss(self.discriminator(reconstruction_B3HW).float())
        weight = loss.new_ones(())
        if self.config.adaptive:
            weight = adaptive_weight(reconstruction_loss, loss, last_layer)
        return self.config.weight * weight * loss, weight

    def accumulate(self, images_B3HW: Tensor, reconstruction_B3HW: Tensor, share: float) -> Tensor:
        """Adds `share` times the discriminator's gradients for one micro-batch; returns the discriminator's loss."""
        logits_B1hw = self.discriminator(torch.cat([images_B3HW, reconstruction_B3HW.detach()])).float()
        real_logits, fake_logits = logits_B1hw.chunk(2)
        loss = hinge_loss(real_logits, fake_logits)
        if self.config.lecam:
            loss = loss + self.config.lecam * self.lecam(real_logits, fake_logits)
        (share * loss).backward()
        self._logit_means += share * torch.stack([real_logits.mean(), fake_logits.mean()]).detach()
        return loss.detach()

    def step(self, lr: float) -> None:
        """Averages gradients and logits over ranks, then updates the discriminator. Collective."""
        parameters = list(self.discriminator.parameters())
        average_gradients(parameters)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_factor * lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.lecam.update(mean_over_ranks(self._logit_means))
        self._logit_means.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {
            "discriminator": self.discriminator.state_dict(),
            "lecam": self.lecam.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.discriminator.load_state_dict(state["discriminator"])
        self.lecam.load_state_dict(state["lecam"])
        self.optimizer.load_state_dict(state["optimizer"])


def build_optimizer(module: nn.Module, config: TokenizerOptimConfig) -> torch.optim.AdamW:
    """Builds AdamW over all parameters. Only kernels decay; biases, norms and the codebook do not."""
    kernels = [parameter for parameter in module.parameters() if parameter.ndim > 2]
    others = [parameter for parameter in module.parameters() if parameter.ndim <= 2]
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.base_lr, betas=config.betas, eps=config.eps, fused=True)


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Returns |d reconstruction / d last layer| / |d adversarial / d last layer| (VQGAN, eq. 7): a scalar, no gradient.

    Collective. The weight is at most 1e4.
    """
    (reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (adversarial,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    reconstruction, adversarial = mean_over_ranks(torch.stack([reconstruction, adversarial]).float())
    return (reconstruction.norm() / (adversarial.norm() + 1e-4)).clamp(0, _MAX_ADAPTIVE)
