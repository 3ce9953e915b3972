"""One optimizer step of the tokenizer, and all state that a resumed run needs to take the next step.

Up to rounding, nothing here depends on the number of ranks or micro-batches: gradients and code counts are summed over
both, and every random choice belongs to a position in the stream of samples or to a step. (The adaptive adversarial
weight is the exception, because it compares gradients of one micro-batch.)

Shape legend: B images of this rank in a micro-batch, G images of the global batch, H = W side of an image, S scales,
V codebook size, D dead codes, C code width, L tokens over all scales.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mepa_ds import distributed
from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
from mepa_ds.data.images import ImageBatch
from mepa_ds.distributed import mean_over_ranks, sum_over_ranks
from mepa_ds.errors import UserError
from mepa_ds.runtime.schedule import learning_rate
from mepa_ds.tokenizer import Tokenizer
from mepa_ds.tokenizer.perceptual import load_lpips
from mepa_ds.tokenizer.quantizer import Quantized
from mepa_ds.tokenizer.usage import CodebookUsage, move_codes, perplexity
from mepa_ds.train_tokenizer.adversary import Adversary, build_optimizer
from mepa_ds.train_tokenizer.reduce import average_gradients
from mepa_ds.train_tokenizer.revival import Revival

# Numbers of the random streams. Each stream is a pure function of (seed, stream, position or step).
_DROPOUT, _REVIVAL = 1, 2


class TokenizerTrainer:
    """Holds the tokenizer (fp32), its optimizer, the usage of codes and the adversary."""

    def __init__(self, config: TokenizerTrainingConfig, tokenizer: Tokenizer, num_steps: int, device: torch.device):
        self.config, self.num_steps, self.device = config, num_steps, device
        self.tokenizer = tokenizer.to(device).requires_grad_(True).train()
        self.parameters = list(self.tokenizer.parameters())
        self.optimizer = build_optimizer(self.tokenizer, config.optim)
        size = config.tokenizer.codebook_size
        self.usage = CodebookUsage(self.tokenizer.schedule, size, config.codebook.usage_decay).to(device)
        adversarial, perceptual = config.loss.adversarial, config.loss.perceptual
        self.adversary = Adversary(adversarial, config.optim, device) if adversarial else None
        self.lpips = load_lpips(perceptual.network, perceptual.backbone_weights).to(device) if perceptual else None
        self.fresh_codes = config.start_from is None
        if self.fresh_codes:
            # Fresh codes move onto residuals of the first step. Only zero codes leave the latent itself as residual.
            nn.init.zeros_(self.tokenizer.quantizer.codebook.weight)
        self.step_index = 0
        self.position = 0
        # For the next record: sums over this rank's micro-batches, and the number of steps in each sum.
        self._totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
        self._num_steps_of: dict[str, float] = defaultdict(float)
        self._num_revived = 0

    @property
    def local_batch(self) -> int:
        """B, the number of images of this rank in one micro-batch."""
        return self.config.train.global_batch // (distributed.world_size() * self.config.train.accumulation)

    def lr_at(self, step_index: int) -> float:
        """Returns the learning rate of a 0-based step."""
        return learning_rate(self.config.optim, self.config.train.global_batch, step_index, self.num_steps)

    def step(self, batches: Iterator[ImageBatch]) -> None:
        """Takes one optimizer step over `accumulation` micro-batches. Collective."""
        schedule, accumulation = self.tokenizer.schedule, self.config.train.accumulation
        hits_SV = torch.zeros(schedule.num_scales, self.config.tokenizer.codebook_size, device=self.device)
        revival = self._plan_revival()
        for micro_index in range(accumulation):
            batch = next(batches).to(self.device)
            offset = (micro_index * distributed.world_size() + distributed.rank()) * self.local_batch
            num_scales_B = self._num_scales(self.position + offset, len(batch.labels_B))
            quantized = self._accumulate(batch.images_B3HW, num_scales_B)
            hits_SV += self.usage.hits_of(quantized.tokens_BL, num_scales_B)
            if revival is not None:
                revival.collect(quantized.residuals_BLC, offset)
        lr = self.lr_at(self.step_index)
        self._update(lr)
        if (adversary := self._adversary_now()) is not None:
            adversary.step(lr)
        self.usage.update(sum_over_ranks(hits_SV))
        if revival is not None:
            values_DC = sum_over_ranks(revival.values_DC)
            move_codes(self.tokenizer.quantizer.codebook, self.optimizer, revival.dead_D, values_DC)
            self.usage.forget(revival.dead_D)
        self.step_index += 1
        self.position += self.config.train.global_batch

    def _accumulate(self, images_B3HW: Tensor, num_scales_B: Tensor | None) -> Quantized:
        """Runs forward and backward of one micro-batch."""
        loss_config, share = self.config.loss, 1 / self.config.train.accumulation
        with self._autocast():
            quantized: Quantized = self.tokenizer.quantizer(self.tokenizer.latent(images_B3HW), num_scales_B)
            reconstruction_B3HW = self.tokenizer.reconstruct(quantized.f_hat_BCHW).float()
        terms = {"reconstruction": F.mse_loss(reconstruction_B3HW, images_B3HW)}
        fidelity = loss_config.reconstruction * terms["reconstruction"]
        if self.lpips is not None and loss_config.perceptual is not None:
            terms["perceptual"] = self.lpips(reconstruction_B3HW, images_B3HW).mean()
            fidelity = fidelity + loss_config.perceptual.weight * terms["perceptual"]
        terms["codebook"], terms["commitment"] = quantized.codebook_loss, quantized.commitment_loss
        loss = fidelity + loss_config.codebook * terms["codebook"] + loss_config.commitment * terms["commitment"]
        if (adversary := self._adversary_now()) is not None:
            with self._autocast():
                last_layer = self.tokenizer.decoder.last_layer
                terms["adversarial"], terms["adaptive_weight"] = adversary.generator_term(
                    reconstruction_B3HW, fidelity, last_layer
                )
            loss = loss + terms["adversarial"]
        # Only the tokenizer gets gradients: the adversarial term passes through the discriminator without training it.
        (share * loss).backward(inputs=self.parameters)
        terms["loss"] = loss
        if adversary is not None:
            with self._autocast():
                terms["discriminator"] = adversary.accumulate(images_B3HW, reconstruction_B3HW, share)
        for name, value in terms.items():
            self._note(name, value, share)
        return quantized

    def _note(self, name: str, value: Tensor, share: float = 1.0) -> None:
        self._totals[name] += share * value.detach()
        self._num_steps_of[name] += share

    def _update(self, lr: float) -> None:
        average_gradients(self.parameters)
        limit = self.config.optim.clip
        norm = nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit)
        self._note("grad_norm", norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _adversary_now(self) -> Adversary | None:
        started = self.adversary is not None and self.step_index >= self.adversary.config.start_step
        return self.adversary if started else None

    def _num_scales(self, position: int, count: int) -> Tensor | None:
        """Returns (B,) numbers of scales that samples use (quantizer dropout), by their positions in the stream.

        None: all samples use all scales.
        """
        codebook, S = self.config.codebook, self.tokenizer.schedule.num_scales
        if not codebook.dropout:
            return None
        key = np.random.SeedSequence([self.config.seed, _DROPOUT])
        bits = np.random.Philox(key, counter=position).random_raw(4 * count)  # the counter counts blocks of four
        stop_B, which_B = (bits.reshape(count, 4)[:, :2] >> np.uint64(11)).T / 2**53
        fewer_B = codebook.dropout_from + np.floor(which_B * (S - codebook.dropout_from))
        num_scales_B = np.where(stop_B < codebook.dropout, fewer_B, S)
        return torch.from_numpy(num_scales_B).to(self.device, torch.int64)

    def _plan_revival(self) -> Revival | None:
        """Chooses the codes that move after this step: all fresh codes in the first step, later the dead codes."""
        codebook = self.config.codebook
        if self.step_index == 0 and self.fresh_codes:
            dead_D = torch.arange(self.config.tokenizer.codebook_size, device=self.device)
        elif codebook.revive_every and self.step_index and self.step_index % codebook.revive_every == 0:
            dead_D = self.usage.dead_codes(codebook.revive_below)
        else:
            return None
        self._num_revived += len(dead_D)
        if not len(dead_D):
            return None
        schedule, batch = self.tokenizer.schedule, self.config.train.global_batch
        counts_GL = torch.ones(batch, schedule.num_tokens, dtype=torch.bool, device=self.device)
        if (num_scales_G := self._num_scales(self.position, batch)) is not None:
            counts_GL = schedule.scale_index_L(self.device) < num_scales_G[:, None]
        key = (self.config.seed, _REVIVAL, self.step_index)
        return Revival.drawn(dead_D, counts_GL, self.config.tokenizer.code_width, key)

    def check_finite(self) -> None:
        """Raises UserError, on every rank, if a gradient since the last call of `metrics` was not finite."""
        # The norm is taken of gradients averaged over ranks, so a NaN loss on one rank shows on all ranks.
        if not math.isfinite(float(self._totals["grad_norm"])):
            raise UserError(
                f"the gradients became infinite or NaN before step {self.step_index}; lower optim.base_lr, "
                "or use precision: fp32. Running again resumes from the last checkpoint"
            )

    def metrics(self) -> dict[str, Any]:
        """Returns means over ranks since the last call, and the usage of codes. Collective."""
        names = sorted(self._totals)
        totals = mean_over_ranks(torch.stack([self._totals[name] for name in names])).tolist()
        record: dict[str, Any] = {
            name: total / self._num_steps_of[name] for name, total in zip(names, totals, strict=True)
        }
        record["revived_codes"] = self._num_revived
        record["codebook_use_by_scale"], record["codebook_use"] = self.usage.shares()
        record["perplexity"] = perplexity(self.usage.frequency_V)
        self._totals.clear()
        self._num_steps_of.clear()
        self._num_revived = 0
        return record

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, which is the same on every rank. Collective."""
        return {
            "step": self.step_index,
            "position": self.position,
            "tokenizer": self.tokenizer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "usage": self.usage.state_dict(),
            "adversary": self.adversary.state_dict() if self.adversary else {},
            "record": {
                "totals": {name: mean_over_ranks(total) for name, total in sorted(self._totals.items())},
                "num_steps_of": dict(self._num_steps_of),
                "num_revived": self._num_revived,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_index, self.position = state["step"], state["position"]
        self.tokenizer.load_state_dict(state["tokenizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.usage.load_state_dict(state["usage"])
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])
        record = state["record"]
        self._totals.update({name: total.to(self.device) for name, total in record["totals"].items()})
        self._num_steps_of.update(record["num_steps_of"])
        self._num_revived = record["num_revived"]
