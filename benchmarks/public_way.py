"""A training step as public code does it, in plain PyTorch, on the weights of our objective: what we compare with.

VAR's own way with the mixture of experts and the guidance that MEPA adds: one attention call with a mask over scales,
experts by boolean masks, bicubic interpolation of hidden states, automatic mixed precision over fp32 weights, and the
tokenizer and the teacher beside the model at every step. The losses are ours (tests/benchmarks/test_train_step.py).

Shapes: B batch, L tokens of all scales, T = B L, C width, H heads, D width of a head, E experts, K choices a token,
V codebook, N patches, P teacher width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mepa_ds.models.feed_forward import FeedForward
from mepa_ds.models.moe.experts import Experts
from mepa_ds.models.moe.layer import MoEFeedForward
from mepa_ds.objective.alignment import NORM_EPS as ALIGNMENT_EPS
from mepa_ds.objective.objective import ModelInputs, PretrainingObjective
from mepa_ds.scales import ScaleSchedule

NORM_EPS = 1e-6


def mask_of(schedule: ScaleSchedule, device: torch.device) -> Tensor:
    """(1, 1, L, L): 0 where a token may look, else minus infinity (VAR's `attn_bias_for_masking`)."""
    scale_L = schedule.scale_index_L(device)
    return torch.where(scale_L[:, None] >= scale_L, 0.0, -torch.inf)[None, None]


def masked_attention(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask_11LL: Tensor, softmax_scale: float) -> Tensor:
    """Every query against every key; the mask then takes away 38 % of them (at 256 px)."""
    mask = mask_11LL.to(q_BHLD.dtype)
    return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=mask, scale=softmax_scale)


def masked_experts(
    x_TC: Tensor, index_TK: Tensor, weight_TK: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """A loop over experts that picks each one's rows by a boolean mask, and puts them back by it."""
    x_RC, index_R = x_TC.repeat_interleave(index_TK.shape[1], dim=0), index_TK.flatten()
    y_RC = None
    for number, expert in enumerate(experts):
        mine_R = index_R == number
        y = expert(x_RC[mine_R])
        y_RC = y.new_empty(x_RC.shape) if y_RC is None else y_RC
        y_RC[mine_R] = y
    assert y_RC is not None
    return (y_RC.view(*index_TK.shape, -1) * weight_TK[..., None]).sum(1)


def interpolated_alignment(
    z_BLP: Tensor, features_BNP: Tensor, schedule: ScaleSchedule, scales: tuple[int, ...]
) -> Tensor:
    """MEPA's guidance loss by interpolation: minus the summed mean cosines of teacher and aggregates."""
    grid = math.isqrt(features_BNP.shape[1])
    teacher_BNP, total = F.normalize(features_BNP.float(), dim=-1), None
    cosine = z_BLP.new_zeros((), dtype=torch.float32)
    for scale in range(max(scales)):
        start, end = schedule.bounds[scale]
        side = schedule.sides[scale]
        z = z_BLP[:, start:end].float().transpose(1, 2).unflatten(2, (side, side))
        if side != grid:
            z = F.interpolate(z, size=(grid, grid), mode="bicubic")
        total = z if total is None else total + z
        if scale + 1 in scales:
            z_BNP = F.normalize(total.flatten(2).transpose(1, 2), dim=-1, eps=ALIGNMENT_EPS)
            cosine = cosine + (z_BNP * teacher_BNP).sum(-1).mean()
    return -cosine


class PublicWay(nn.Module):
    """The plain step's losses, on the weights of `objective`, which it takes over: each expert becomes a module."""

    def __init__(self, objective: PretrainingObjective):
        super().__init__()
        self.objective = objective
        blocks: list[Any] = list(objective.transformer.blocks)
        for ffn in (block.ffn for block in blocks):
            if isinstance(ffn, MoEFeedForward):
                ffn.experts = separate_experts(ffn.experts)  # type: ignore[assignment]
        self.mask_11LL: Tensor
        weight = objective.transformer.head.weight
        self.register_buffer("mask_11LL", mask_of(objective.transformer.schedule, weight.device), persistent=False)

    def forward(self, inputs: ModelInputs) -> Tensor:
        """The total loss of one micro-batch."""
        objective, model = self.objective, self.objective.transformer
        class_BC = model.class_embed(inputs.labels_B)
        x_BLC = torch.cat([class_BC[:, None] + model.start_embed, model.word_embed(inputs.inputs_BLZ.float())], dim=1)
        scale_L = model.schedule.scale_index_L(x_BLC.device)
        x_BLC = x_BLC + model.scale_embed(scale_L) + model.position_embed
        balance, hidden_BLC = x_BLC.new_zeros(()), x_BLC
        for index in range(len(model.blocks)):
            kept_2B = None if inputs.branch_scale_D2B is None else inputs.branch_scale_D2B[index]
            x_BLC, layer_balance = self._block(model.blocks[index], x_BLC, class_BC, scale_L, kept_2B)
            balance = balance + layer_balance
            if index == objective.hidden_after:
                hidden_BLC = x_BLC
        scale, shift = model.head_adaln(F.silu(class_BC)).view(-1, 1, 2, x_BLC.shape[-1]).unbind(2)
        logits_BLV = model.head(F.layer_norm(x_BLC.float(), x_BLC.shape[-1:], eps=NORM_EPS) * (scale + 1) + shift)
        flat = logits_BLV.float().view(-1, logits_BLV.shape[-1]), inputs.tokens_BL.flatten()
        total = objective.config.ce_weight * F.cross_entropy(*flat, reduction="none").mean()
        with torch.no_grad():  # the accuracy that VAR logs
            (flat[0].argmax(-1) == flat[1]).float().mean()
        if objective.config.alignment is not None and inputs.features_BNP is not None:
            assert objective.projector is not None
            scales = objective.config.alignment.scales
            end = model.schedule.bounds[max(scales) - 1][1]
            z_BLP = objective.projector(hidden_BLC[:, :end])
            alignment = interpolated_alignment(z_BLP, inputs.features_BNP, model.schedule, scales)
            total = total + objective.config.alignment.weight * alignment
        return total + objective.config.balance_weight * balance

    def _block(
        self, block: Any, x_BLC: Tensor, class_BC: Tensor, scale_L: Tensor, kept_2B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """VAR's block: (B, L, C) -> (B, L, C), and the balance loss of its experts."""
        B, L, C = x_BLC.shape
        kept = [1.0, 1.0] if kept_2B is None else [kept[:, None, None] for kept in kept_2B]
        modulation = block.adaln(F.silu(class_BC)).view(-1, 1, 6, C)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        normed = F.layer_norm(x_BLC, (C,), eps=NORM_EPS).mul(scale1.add(1)).add(shift1)
        attention = block.attention
        bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
        qkv = F.linear(normed, attention.qkv.weight, bias).view(B, L, 3, attention.num_heads, -1)
        q_BHLD, k_BHLD, v_BHLD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if attention.log_temperature is not None:
            temperature = attention.log_temperature.clamp_max(attention.MAX_LOG_TEMPERATURE).exp()
            q_BHLD = (F.normalize(q_BHLD, dim=-1) * temperature).to(v_BHLD.dtype)
            k_BHLD = F.normalize(k_BHLD, dim=-1).to(v_BHLD.dtype)
        out_BHLD = masked_attention(q_BHLD, k_BHLD, v_BHLD, self.mask_11LL, attention.softmax_scale)
        branch = attention.proj(out_BHLD.transpose(1, 2).reshape(B, L, C))
        x_BLC = x_BLC + branch.mul(gamma1) * kept[0]
        normed = F.layer_norm(x_BLC, (C,), eps=NORM_EPS).mul(scale2.add(1)).add(shift2)
        balance = x_BLC.new_zeros(())
        if isinstance(block.ffn, MoEFeedForward):
            branch, balance = self._mixture(block.ffn, normed, scale_L)
        else:
            branch = block.ffn(normed)
        return x_BLC + branch.mul(gamma2) * kept[1], balance

    def _mixture(self, layer: MoEFeedForward, x_BLC: Tensor, scale_L: Tensor) -> tuple[Tensor, Tensor]:
        """Router, masked experts and the shared expert: (B, L, C) -> (B, L, C), and the balance loss."""
        x_TC = x_BLC.flatten(0, 1)
        router: Any = layer.router
        with torch.autocast(x_TC.device.type, enabled=False):
            logits_TE = F.linear(x_TC.float(), router.gate.weight)
            probs_TE = (logits_TE + router.scale_logits_SE[scale_L].repeat(len(x_BLC), 1)).softmax(-1)
            weight_TK, index_TK = probs_TE.topk(router.top_k, dim=-1)
            share_E = F.one_hot(index_TK, layer.num_experts).sum(1).float().mean(0) / router.top_k
            balance = layer.num_experts * (share_E * probs_TE.mean(0)).sum()
        y_TC = masked_experts(x_TC, index_TK, weight_TK, list(layer.experts))  # type: ignore[call-overload]
        if layer.shared is not None:
            y_TC = y_TC + layer.shared(x_TC)
        return y_TC.view_as(x_BLC), balance


def separate_experts(experts: Experts) -> nn.ModuleList:
    """The stacked experts as modules with weights of their own."""
    modules = nn.ModuleList()
    for number in range(experts.num_experts):
        expert = FeedForward(experts.fc1_weight.shape[2], experts.fc1_weight.shape[1])
        for layer, name in ((expert.fc1, "fc1"), (expert.fc2, "fc2")):
            for part in ("weight", "bias"):
                stacked = getattr(experts, f"{name}_{part}")
                setattr(layer, part, nn.Parameter(stacked[number].detach().clone()))
        modules.append(expert)
    return modules


class PlainViT(nn.Module):
    """ViT-B/14 at 224 px: the teacher's sizes (12 blocks, width 768, 12 heads, 257 tokens) with random weights."""

    WIDTH, HEADS, DEPTH, PATCH, SIDE = 768, 12, 12, 14, 224

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, self.WIDTH, self.PATCH, self.PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, self.WIDTH))
        self.positions = nn.Parameter(torch.randn(1, (self.SIDE // self.PATCH) ** 2 + 1, self.WIDTH) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(self.WIDTH) for _ in range(2 * self.DEPTH + 1))
        self.qkvs = nn.ModuleList(nn.Linear(self.WIDTH, 3 * self.WIDTH) for _ in range(self.DEPTH))
        self.outs = nn.ModuleList(nn.Linear(self.WIDTH, self.WIDTH) for _ in range(self.DEPTH))
        self.fc1s = nn.ModuleList(nn.Linear(self.WIDTH, 4 * self.WIDTH) for _ in range(self.DEPTH))
        self.fc2s = nn.ModuleList(nn.Linear(4 * self.WIDTH, self.WIDTH) for _ in range(self.DEPTH))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Patch features (B, 256, 768) of images of any size."""
        images = F.interpolate(images_B3HW, size=(self.SIDE, self.SIDE), mode="bicubic", antialias=True)
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        B, L, C = x.shape
        for index in range(self.DEPTH):
            qkv = self.qkvs[index](self.norms[2 * index](x)).view(B, L, 3, self.HEADS, -1)
            out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
            x = x + self.outs[index](out.transpose(1, 2).reshape(B, L, C))
            x = x + self.fc2s[index](F.gelu(self.fc1s[index](self.norms[2 * index + 1](x))))
        return self.norms[-1](x)[:, 1:].float()
