"""Tiny models of several widths, trained in one process without DeepSpeed, by the groups of the engine's optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig
from mepa_ds.config.optim import PretrainOptimConfig
from mepa_ds.engine.optimizer import build_optimizer
from mepa_ds.models.moe.layer import MoEFeedForward
from mepa_ds.models.transformer import NextScaleTransformer

HEAD_WIDTH, CLASSES, CODES, CODE_WIDTH, TOKENS = 16, 10, 32, 8, 14
# The token that the next one depends on; the first depends on the class alone.
PARENT = torch.tensor([0 if place < 5 else 1 + place % 4 for place in range(1, TOKENS)])
_teacher = torch.Generator().manual_seed(5)
# Three codes may follow each (class, code): the task's entropy is ln 3 a token at most.
NEXT = torch.randint(0, CODES, (CLASSES, CODES, 3), generator=_teacher)
CODEBOOK = torch.randn(CODES, CODE_WIDTH, generator=_teacher)


class Batch(NamedTuple):
    labels_B: Tensor
    tokens_BL: Tensor
    inputs_BLZ: Tensor


def draw_batch(generator: torch.Generator, batch: int) -> Batch:
    labels_B = torch.randint(0, CLASSES, (batch,), generator=generator)
    choice_BL = torch.randint(0, 3, (batch, TOKENS), generator=generator)
    tokens_BL = torch.zeros(batch, TOKENS, dtype=torch.int64)
    tokens_BL[:, 0] = NEXT[labels_B, 0, choice_BL[:, 0]]
    for place, parent in enumerate(PARENT.tolist(), start=1):
        tokens_BL[:, place] = NEXT[labels_B, tokens_BL[:, parent], choice_BL[:, place]]
    return Batch(labels_B, tokens_BL, CODEBOOK[tokens_BL[:, PARENT]])


def make_model(width: int, seed: int = 0, base_width: int | None = None, **changes: Any) -> NextScaleTransformer:
    """Two blocks, the second with experts. Gates and head are as large as other weights, so that all of it learns."""
    values: dict[str, Any] = {
        "depth": 2, "width": width, "num_heads": width // HEAD_WIDTH, "num_classes": CLASSES, "scales": [1, 2, 3],
        "codebook_size": CODES, "code_width": CODE_WIDTH, "adaln_gamma_init": 1.0, "head_init": 1.0,
        "moe": {"num_experts": 4, "expert_ratio": 2.0, "every": 2}, **changes,
    }  # fmt: skip
    with torch.device("meta"):
        model = NextScaleTransformer(validate(ModelConfig, values, "test"))
    model.to_empty(device="cpu")
    model.init_weights(seed, base_width)
    return model


class Run:
    """A model and its optimizer. Weight decay is on, since muP scales it too."""

    def __init__(self, width: int, base_width: int | None, seed: int = 0):
        self.model = make_model(width, seed, base_width)
        optim = PretrainOptimConfig(mup_base_width=base_width)
        self.optimizer = build_optimizer(self.model, optim, width)
        self._stream = torch.Generator().manual_seed(100 + seed)

    def train(self, steps: int, lr: float, batch: int) -> list[float]:
        """Returns the loss of every step."""
        losses = []
        for _ in range(steps):
            drawn = draw_batch(self._stream, batch)
            logits_BLV = self.model(drawn.labels_B, drawn.inputs_BLZ).logits_BLV
            loss = F.cross_entropy(logits_BLV.transpose(1, 2), drawn.tokens_BL)
            self.optimizer.zero_grad()
            loss.backward()
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    @torch.no_grad()
    def activations(self) -> dict[str, Tensor]:
        """Hidden states after each block, router logits and logits, on one batch that is always the same."""
        probe, seen = draw_batch(torch.Generator().manual_seed(7), 32), dict[str, Tensor]()
        hooks = [
            block.register_forward_hook(lambda _, __, out, name=f"block {index}": seen.update({name: out[0]}))
            for index, block in enumerate(self.model.blocks)
        ]
        hooks += [
            module.router.register_forward_hook(lambda _, __, out: seen.update({"router": out.logits_TE}))
            for module in self.model.modules()
            if isinstance(module, MoEFeedForward)
        ]
        seen["logits"] = self.model(probe.labels_B, probe.inputs_BLZ).logits_BLV
        for hook in hooks:
            hook.remove()
        return {name: value.clone() for name, value in seen.items()}


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """The exponent of a power law in the width, by least squares."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The minimum of the parabola in log rate through the best rate and its neighbours. It must not be at the edge."""
    best = int(np.argmin(losses))
    assert 0 < best < len(rates) - 1, f"the best rate is at the edge of the sweep: {losses}"
    near = slice(best - 1, best + 2)
    a, b, _ = np.polyfit(np.log(rates[near]), losses[near], 2)
    return math.exp(-b / (2 * a))
