"""The size of a model: its total and its active parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mepa_ds.config.model import ModelConfig
from mepa_ds.models.transformer import NextScaleTransformer

_MATRICES = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "gate.weight", "head.weight")
_EXPERT_MATRICES = ("experts.fc1_weight", "experts.fc2_weight")


@dataclass(frozen=True)
class ParameterCounts:
    """The parameters of the transformer. The projector of semantic guidance, for training only, is not counted."""

    total: int
    active: int
    """Parameters that one token passes: all but those of the routed experts to which it is not sent."""
    experts: int
    """Parameters of all routed experts, a part of the total."""
    matrix: int
    """Weights of the matrices that every token meets, the N of scaling laws: attention, FFN or active experts, router,
    head. AdaLN, embeddings, biases and vectors are not among them."""
    adaln: int
    """Parameters of AdaLN, of the blocks and of the head. They act on an image, not on its tokens."""
    embedding: int
    """Parameters of the embeddings of words, classes, positions, scales and of the start."""

    def __str__(self) -> str:
        return f"{self.total / 1e6:.1f}M parameters, {self.active / 1e6:.1f}M active"


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Counts a model's parameters on the meta device, which takes no memory."""
    with torch.device("meta"):
        model = NextScaleTransformer(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = {name: size for name, size in sizes.items() if ".experts." in name}
    adaln = sum(size for name, size in sizes.items() if "adaln" in name)
    embedding = sum(size for name, size in sizes.items() if name.split(".")[0].endswith("_embed"))
    matrix = sum(size for name, size in sizes.items() if name.endswith(_MATRICES))
    expert_matrix = sum(size for name, size in experts.items() if name.endswith(_EXPERT_MATRICES))
    total, routed = sum(sizes.values()), sum(experts.values())
    share = (config.moe.top_k, config.moe.num_experts) if config.moe else (0, 1)

    def used(size: int) -> int:
        return size * share[0] // share[1]

    return ParameterCounts(total, total - routed + used(routed), routed, matrix + used(expert_matrix), adaln, embedding)
