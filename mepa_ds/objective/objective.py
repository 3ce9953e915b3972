"""The pretraining objective: one module from a batch to named losses.

Shapes: B batch, L positions, S scales, V codebook, Z code width, C width, N teacher patches, P teacher width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mepa_ds.config.objective import ObjectiveConfig
from mepa_ds.models.adapting.freezing import is_frozen
from mepa_ds.models.moe.layer import MoEFeedForward
from mepa_ds.models.moe.routing import RoutingStatistics
from mepa_ds.models.parametrisation import init_factor, width_multiplier
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.alignment import Projector, alignment_loss
from mepa_ds.objective.balance import balance_loss, global_counts, router_z_loss
from mepa_ds.objective.cross_entropy import token_losses
from mepa_ds.objective.scale_weights import token_weights
from mepa_ds.random_streams import generator
from mepa_ds.scales import ScaleSchedule


@dataclass
class ModelInputs:
    """One micro-batch on the device. Randomness (dropped labels, stochastic depth) is drawn by the caller."""

    labels_B: Tensor
    inputs_BLZ: Tensor
    tokens_BL: Tensor
    features_BNP: Tensor | None = None
    branch_scale_D2B: Tensor | None = None
    earlier_counts_NE: Tensor | None = None
    """Routed pairs of the step's earlier micro-batches (objective.balance_over = "step")."""
    guidance: float = 1.0
    """The share of objective.alignment.weight in this step; 0: semantic guidance is not computed."""


@dataclass
class ScaleScores:
    """Sums over images and positions, per scale; they add up over micro-batches and ranks."""

    ce_sum_S: Tensor
    correct_S: Tensor
    tokens_S: Tensor


@dataclass
class Losses:
    """`total` is the loss for the backward pass; `terms` are its detached parts before weighting."""

    total: Tensor
    terms: dict[str, Tensor]
    scores: ScaleScores
    routing: dict[int, RoutingStatistics]
    counts_NE: Tensor | None = None
    """Routed pairs of this micro-batch, MoE layer by expert, over all ranks."""

    def detached(self) -> Losses:
        """The same losses without their autograd graph.

        A backward pass frees the parts of the graph that it goes through; the part of a loss of weight 0 would stay.
        """
        routing = {block: statistics.detached() for block, statistics in self.routing.items()}
        return replace(self, total=self.total.detach(), routing=routing)


def sum_scales(ce_BL: Tensor, hits_BL: Tensor, schedule: ScaleSchedule, weight_B: Tensor | None = None) -> ScaleScores:
    """Cross-entropy (nats) and top-1 hits of every scale, summed over images (each times its weight, if given).

    Scales beyond the end of `ce_BL` have sums of 0, also of tokens.
    """
    scores_3BL = torch.stack([ce_BL, hits_BL, torch.ones_like(ce_BL)])
    if weight_B is not None:
        scores_3BL = scores_3BL * weight_B[:, None]
    scores_3L = scores_3BL.sum(1)
    return ScaleScores(*torch.stack([scores_3L[:, start:end].sum(1) for start, end in schedule.bounds], dim=1))


def nonfinite_routers(micro_batches: Sequence[Losses]) -> list[int]:
    """Blocks whose router logits were not finite on some rank: the same list on every rank."""
    blocks: set[int] = set()
    for losses in micro_batches:
        if losses.counts_NE is not None:
            lost_N = losses.counts_NE.isnan().any(-1).tolist()
            blocks.update(block for block, lost in zip(losses.routing, lost_N, strict=True) if lost)
    return sorted(blocks)


class PretrainingObjective(nn.Module):
    """Transformer + projector + losses. `reduce_counts` sums routing counts over ranks (identity in one process)."""

    def __init__(
        self,
        transformer: NextScaleTransformer,
        config: ObjectiveConfig,
        teacher_width: int | None,
        reduce_counts: Callable[[Tensor], Tensor] = lambda counts: counts,
    ):
        super().__init__()
        self.transformer = transformer
        self.config = config
        self.reduce_counts = reduce_counts
        self.projector: Projector | None = None
        self.hidden_after: int | None = None
        if config.alignment is not None:
            self.hidden_after = config.alignment.block_of(transformer.config.depth)
            assert self.hidden_after < transformer.config.depth, "alignment block beyond the last block"
            assert max(config.alignment.scales) <= transformer.schedule.num_scales, "alignment scale beyond the last"
            assert teacher_width is not None, "semantic guidance needs the teacher's width"
            self.projector = Projector(transformer.config.C, config.alignment.projector_hidden, teacher_width)

    @torch.no_grad()
    def init_weights(self, seed: int, base_width: int | None = None) -> None:
        """Draws all initial weights; a function of seed and parameter names only. `base_width`: for muP."""
        self.transformer.init_weights(seed, base_width)
        if self.projector is not None:
            m = width_multiplier(self.transformer.config.C, base_width)
            for name, parameter in self.projector.named_parameters():
                bound = 1 / math.sqrt(parameter.shape[-1])  # nn.Linear's own
                if name == "0.weight":  # the one whose fan-in is C: an output weight
                    bound *= init_factor(f"projector.{name}", m)
                drawn = torch.empty(parameter.shape).uniform_(
                    -bound, bound, generator=generator(seed, "init", "projector", name)
                )
                parameter.copy_(drawn)

    def forward(self, inputs: ModelInputs) -> Losses:
        output = self.transformer(
            inputs.labels_B,
            inputs.inputs_BLZ,
            branch_scale_D2B=inputs.branch_scale_D2B,
            hidden_after=self.hidden_after,
        )
        loss_BL, ce_BL, hits_BL = token_losses(output.logits_BLV, inputs.tokens_BL, self.config.label_smoothing)
        loss = self._mean(loss_BL)
        is_plain = self.config.ce_over == "tokens" and not self.config.label_smoothing
        total, terms = self.config.ce_weight * loss, {"ce": loss.detach() if is_plain else ce_BL.mean()}
        counts_NE: Tensor | None = None
        if self.config.alignment is not None:
            alignment = self._alignment(output.hidden_BLC, inputs)
            total = total + self.config.alignment.weight * inputs.guidance * alignment
            terms["alignment"] = alignment.detach()
        if output.routing:
            layers = list(output.routing.values())
            counts_NE = global_counts(layers, self.reduce_counts)
            earlier = inputs.earlier_counts_NE
            balance_N = balance_loss(layers, counts_NE if earlier is None else counts_NE + earlier)
            total = total + self.config.balance_weight * balance_N.sum()
            terms["balance"] = balance_N.detach().mean()
            if self.config.router_z_weight:
                z_N = router_z_loss(layers)
                total = total + self.config.router_z_weight * z_N.sum()
                terms["router_z"] = z_N.detach().mean()
        scores = sum_scales(ce_BL, hits_BL, self.transformer.schedule)
        return Losses(total, terms | {"total": total.detach()}, scores, output.routing, counts_NE)

    def _mean(self, loss_BL: Tensor) -> Tensor:
        """The mean over `objective.ce_over`, of the scales that this step trains."""
        if self.config.ce_over == "tokens":
            return loss_BL.mean()
        weights_L = token_weights(self.config.ce_over, self.transformer.schedule, loss_BL.device)[: loss_BL.shape[1]]
        return (loss_BL * (weights_L / weights_L.mean())).mean()

    def update_balance_bias(self, counts_NE: Tensor) -> None:
        """One step of loss-free balancing, where it is on: the routed pairs of a whole optimizer step. What a frozen
        router chooses stays."""
        layers = [m for m in self.transformer.modules() if isinstance(m, MoEFeedForward)]
        for layer, counts_E in zip(layers, counts_NE, strict=True):
            if not all(map(is_frozen, layer.router.parameters())):
                layer.router.update_bias(counts_E)

    def _alignment(self, hidden_BLC: Tensor | None, inputs: ModelInputs) -> Tensor:
        assert hidden_BLC is not None
        assert self.projector is not None
        assert self.config.alignment is not None
        assert inputs.features_BNP is not None, "semantic guidance needs the teacher's features"
        schedule = self.transformer.schedule
        present = [scale for scale, (_, end) in enumerate(schedule.bounds, start=1) if end <= hidden_BLC.shape[1]]
        scales = [scale for scale in self.config.alignment.scales if scale in present]
        if not scales or not inputs.guidance:  # no aligned scale is trained yet, or guidance has ended
            # No loss, but every parameter needs a gradient (of 0).
            return 0 * self.projector(hidden_BLC[:, :1]).float().mean()
        end = schedule.bounds[max(scales) - 1][1]
        return alignment_loss(self.projector(hidden_BLC[:, :end]), inputs.features_BNP, schedule, scales)
