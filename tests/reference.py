"""Training written out in plain torch and float64, for tests: model, losses and optimizer as the papers have them.

Nothing here comes from the package: a test that compares a run with this sees faults that all layouts of it share.
Shapes: B batch, L tokens over all scales, S scales, C width, H heads, E experts, Z code width.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
# Of VAR: matrices and the class embedding decay, nothing else.
DECAYING = (
    "word_embed.weight", "class_embed.weight", "adaln.weight", "qkv.weight", "proj.weight", "gate.weight",
    "head.weight", "fc1.weight", "fc2.weight", "fc1_weight", "fc2_weight", "projector.0.weight", "projector.2.weight",
    "projector.4.weight",
)  # fmt: skip


# Of muP: weights that have a fan-in which grows with the width. Their rate is divided by m, and their decay times it.
READS_WIDTH = (
    "adaln.weight", "qkv.weight", "proj.weight", "gate.weight", "head.weight", "fc1.weight", "fc2.weight",
    "fc1_weight", "fc2_weight", "projector.0.weight",
)  # fmt: skip


@dataclass
class Forward:
    """What one forward pass gives; `layers` has (counts_E, mean probability P_E, mean z) of every MoE layer."""

    logits_BLV: Tensor
    hidden_BLC: list[Tensor]
    layers: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def feed_forward(w: Weights, x: Tensor, name: str) -> Tensor:
    hidden = gelu(x @ w[f"{name}.fc1.weight"].T + w[f"{name}.fc1.bias"])
    return hidden @ w[f"{name}.fc2.weight"].T + w[f"{name}.fc2.bias"]


def attention(w: Weights, x: Tensor, name: str, num_heads: int, scale_L: Tensor) -> Tensor:
    """Unit queries and keys times a temperature of at most 100; a full mask over scales."""
    B, L, C = x.shape
    q, k, v = (x @ w[f"{name}.qkv.weight"].T).chunk(3, -1)
    q, v = q + w[f"{name}.q_bias"], v + w[f"{name}.v_bias"]
    q, k, v = (part.view(B, L, num_heads, C // num_heads).transpose(1, 2) for part in (q, k, v))
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    temperature = w[f"{name}.log_temperature"].exp().clamp_max(100)
    scores = (temperature * (q @ k.transpose(-1, -2))).masked_fill(scale_L[:, None] < scale_L[None, :], -math.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, C)
    return out @ w[f"{name}.proj.weight"].T + w[f"{name}.proj.bias"]


def experts(
    w: Weights, x: Tensor, name: str, top_k: int, scale_L: Tensor, bias_E: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Every expert on every token, weighted by the router's probability where it was chosen, and 0 elsewhere."""
    logits = x @ w[f"{name}.router.gate.weight"].T + w[f"{name}.router.scale_logits_SE"][scale_L]
    probs = logits.softmax(-1)
    chosen = torch.zeros_like(probs).scatter(-1, (probs + bias_E).topk(top_k, dim=-1).indices, 1.0)
    y = feed_forward(w, x, f"{name}.shared")
    for e in range(probs.shape[-1]):
        hidden = gelu(x @ w[f"{name}.experts.fc1_weight"][e].T + w[f"{name}.experts.fc1_bias"][e])
        out = hidden @ w[f"{name}.experts.fc2_weight"][e].T + w[f"{name}.experts.fc2_bias"][e]
        y = y + (probs * chosen)[..., e, None] * out
    return y, (chosen.sum((0, 1)).detach(), probs.mean((0, 1)), logits.logsumexp(-1).square().mean())


def forward(
    w: Weights, labels_B: Tensor, inputs_BLZ: Tensor, *, scales: tuple[int, ...], num_heads: int, top_k: int = 2,
    biases: list[Tensor] | None = None, kept_D2B: Tensor | None = None,
) -> Forward:  # fmt: skip
    """`w` has the transformer's own names.

    biases: of the choice of experts, one (E,) a MoE layer. kept_D2B: stochastic depth's factors of attention and FFN,
    block by block and image by image.
    """
    scale_L = torch.cat([torch.full((side * side,), index) for index, side in enumerate(scales)])
    class_BC = w["class_embed.weight"][labels_B]
    words = inputs_BLZ.double() @ w["word_embed.weight"].T + w["word_embed.bias"]
    x = torch.cat([class_BC[:, None] + w["start_embed"], words], 1)
    x = x + w["position_embed"] + w["scale_embed.weight"][scale_L]
    condition, result = class_BC * torch.sigmoid(class_BC), Forward(torch.empty(0), [])
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    if kept_D2B is None:
        kept_D2B = torch.ones(depth, 2, len(labels_B))
    for block, kept_2B11 in zip((f"blocks.{index}" for index in range(depth)), kept_D2B[..., None, None], strict=True):
        ada = condition @ w[f"{block}.adaln.weight"].T + w[f"{block}.adaln.bias"]
        gate1, gate2, scale1, scale2, shift1, shift2 = ada[:, None].chunk(6, -1)
        x = x + kept_2B11[0] * gate1 * attention(
            w, modulated(x, scale1, shift1), f"{block}.attention", num_heads, scale_L
        )
        normed = modulated(x, scale2, shift2)
        if f"{block}.ffn.router.gate.weight" in w:
            bias_E = torch.zeros(1) if biases is None else biases[len(result.layers)]
            y, statistics = experts(w, normed, f"{block}.ffn", top_k, scale_L, bias_E)
            result.layers.append(statistics)
        else:
            y = feed_forward(w, normed, f"{block}.ffn")
        x = x + kept_2B11[1] * gate2 * y
        result.hidden_BLC.append(x)
    scale, shift = (condition @ w["head_adaln.weight"].T + w["head_adaln.bias"])[:, None].chunk(2, -1)
    result.logits_BLV = modulated(x, scale, shift) @ w["head.weight"].T + w["head.bias"]
    return result


def alignment(
    w: Weights, hidden_BLC: Tensor, features_BNP: Tensor, scales: tuple[int, ...], chosen: set[int]
) -> Tensor:
    """-mean over patches of the summed cosines of the `chosen` (1-based) scales' aggregates."""
    x = hidden_BLC
    for layer in (0, 2, 4):
        x = x @ w[f"projector.{layer}.weight"].T + w[f"projector.{layer}.bias"]
        x = x * torch.sigmoid(x) if layer < 4 else x
    side, start = math.isqrt(features_BNP.shape[1]), 0
    total, cosines = torch.zeros(1), torch.zeros(())
    for number, grid in enumerate(scales, start=1):
        token_map = x[:, start : start + grid * grid].transpose(1, 2).unflatten(2, (grid, grid))
        total = total + F.interpolate(token_map, size=(side, side), mode="bicubic")
        start += grid * grid
        if number in chosen:
            cosines = cosines + F.cosine_similarity(total.flatten(2).transpose(1, 2), features_BNP, dim=-1).mean()
    return -cosines


@dataclass
class AdamW:
    """Adam with decoupled weight decay, a clipped global norm, and an average of the weights; `m` is muP's C / C0."""

    weights: Weights
    betas: tuple[float, float]
    eps: float
    decay: float
    clip: float
    ema: float
    decays: Callable[[str, Tensor], bool] = lambda name, _: name.endswith(DECAYING)
    steps: int = 0
    m: float = 1.0

    def __post_init__(self) -> None:
        self.first = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.average = {name: value.detach().clone() for name, value in self.weights.items()}

    def step(self, loss: Tensor, lr: float) -> float:
        """Returns the norm before clipping; does nothing to the weights when it is not finite."""
        names = list(self.weights)
        gradients = torch.autograd.grad(loss, [self.weights[name] for name in names])
        return self.apply(dict(zip(names, gradients, strict=True)), lr)

    def apply(self, gradients: Weights, lr: float) -> float:
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
        if not math.isfinite(norm):
            return norm
        self.steps += 1
        factor = min(1.0, self.clip / norm)
        (beta1, beta2), t = self.betas, self.steps
        for name, gradient in gradients.items():
            clipped, value = gradient * factor, self.weights[name].detach()
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * clipped
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * clipped**2
            m, v = self.first[name] / (1 - beta1**t), self.second[name] / (1 - beta2**t)
            rate, decay = (lr / self.m, self.decay * self.m) if name.endswith(READS_WIDTH) else (lr, self.decay)
            if self.decays(name, value):
                value = value - rate * decay * value
            value = value - rate * m / (v.sqrt() + self.eps)
            self.weights[name] = value.requires_grad_()
            self.average[name] = self.ema * self.average[name] + (1 - self.ema) * value.detach()
        return norm


def read_samples(directory: Path) -> list[dict[str, np.ndarray]]:
    """Every sample's members in the order of the files, by Python's own tarfile. A damaged array is missing."""
    samples: dict[str, dict[str, np.ndarray]] = {}
    for shard in json.loads((directory / "index.json").read_text())["shards"]:
        with tarfile.open(directory / shard["name"]) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                sample = samples.setdefault(key, {})
                content = file.read()
                try:
                    sample[extension] = np.array(int(content)) if extension == "cls" else np.load(io.BytesIO(content))
                except ValueError:
                    continue
    return list(samples.values())


def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """The permutation of an epoch, as docs and code promise it: Philox numbers, sorted."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, 0])).random_raw(size)
    return np.argsort(bits, kind="stable").tolist()
