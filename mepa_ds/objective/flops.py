"""Floating-point operations of a training step, by formula, and the peaks of GPUs; their ratio is the MFU.

A product of (m, n) and (n, k) matrices is 2 m n k operations. The model's own products are counted, once forward and
twice backward; what activation checkpointing computes again is not, nor are norms and activations (PaLM's model FLOPs,
arXiv 2204.02311, appendix B). For one image, L tokens, width C, FFN hidden width F, K of E experts of hidden width X:

    a block   qkv and output   8 L C^2          attention   4 C sum_scales l_s e_s    (e_s: where scale s ends)
              dense FFN        4 L C F          or MoE      4 L C X (K + shared) + 2 L C E (router)
              AdaLN            12 C^2           (once for all blocks if shared)
    around    word embedding   2 (L - l_0) Z C  head        2 L C V + 4 C^2
    guidance  projector        2 L_F (C h + h^2 + h P) on the L_F tokens up to the last aligned scale
"""

from __future__ import annotations

import torch

from mepa_ds import distributed
from mepa_ds.config.model import ModelConfig
from mepa_ds.config.objective import AlignmentConfig
from mepa_ds.config.pretrain import PretrainConfig

# Dense bf16 / fp16 tensor-core peaks of the vendors' data sheets, by a part of the device's name; first match counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,  # one of its two devices
}


FORWARD_AND_BACKWARD = 3  # in forward passes: a backward pass has twice the products


def peak_flops_per_second(precision: str) -> float | None:
    """One GPU's peak; None for a CPU, for fp32 and for a GPU that is not in the list."""
    if not distributed.uses_gpu() or precision == "fp32":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def mfu(step_flops: float, seconds: float, peak: float, world_size: int) -> float:
    """Model FLOPs utilisation: the share of the peaks of all GPUs that a step of `seconds` uses."""
    return step_flops / seconds / (peak * world_size)


def forward_flops(model: ModelConfig, num_scales: int | None = None) -> float:
    """One image's first scales (None: all) through the transformer."""
    return sum(forward_flops_by_part(model, num_scales).values())


def forward_flops_by_part(model: ModelConfig, num_scales: int | None = None) -> dict[str, float]:
    """The same by part: projections of attention, attention itself, FFN, experts, router, AdaLN, words, head."""
    C, schedule = model.C, model.schedule
    bounds = schedule.bounds[:num_scales]
    L = bounds[-1][1]
    attended = sum((end - start) * (end - start if model.markovian else end) for start, end in bounds)
    num_moe = sum(model.is_moe_block(index) for index in range(model.depth))
    experts = router = 0.0
    if model.moe is not None:
        used = model.moe.top_k + int(model.moe.shared_expert)
        experts = num_moe * 4 * L * C * model.expert_hidden * used
        router = num_moe * 2 * L * C * model.moe.num_experts if model.moe.router != "smoe" else 0.0
    return {
        "projections": model.depth * 8 * L * C * C,
        "attention": model.depth * 4 * C * attended,
        "ffn": (model.depth - num_moe) * 4 * L * C * model.dense_hidden,
        "experts": experts,
        "router": router,
        "adaln": 12 * C * C * (1 if model.shared_adaln else model.depth) + 4 * C * C,
        "words": 2 * (L - schedule.lengths[0]) * model.code_width * C,
        "head": 2 * L * C * model.codebook_size,
    }


def image_flops(model: ModelConfig) -> dict[str, float]:
    """One image forward and backward, by part, as `forward_flops_by_part` has them."""
    return {part: FORWARD_AND_BACKWARD * flops for part, flops in forward_flops_by_part(model).items()}


def projector_flops(
    model: ModelConfig, alignment: AlignmentConfig, teacher_width: int, num_scales: int | None = None
) -> float:
    """One image's hidden states through the projector of semantic guidance."""
    aligned = [scale for scale in alignment.scales if num_scales is None or scale <= num_scales]
    tokens = model.schedule.bounds[max(aligned) - 1][1] if aligned else 0
    hidden = alignment.projector_hidden
    return 2 * tokens * (model.C * hidden + hidden * hidden + hidden * teacher_width)


def step_flops(config: PretrainConfig, teacher_width: int | None, num_scales: int | None = None) -> float:
    """One optimizer step over all ranks, forward and backward, of the first scales (None: all).

    With guidance, also where alignment.until has ended it: the projector is then not computed, but counted.
    """
    forward = forward_flops(config.model, num_scales)
    if config.objective.alignment is not None and teacher_width is not None:
        forward += projector_flops(config.model, config.objective.alignment, teacher_width, num_scales)
    return FORWARD_AND_BACKWARD * forward * config.train.global_batch
