"""Held-out cross-entropy and accuracy. Reads the model, changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from mepa_ds import distributed
from mepa_ds.data.lockstep import lockstep, report_damaged
from mepa_ds.data.training import OnDamaged, evaluation_batches
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.objective import ScaleScores, sum_scales
from mepa_ds.objective.reports import add_up, score_report
from mepa_ds.pretrain.inputs import InputMaker


def heldout_scores(
    model: NextScaleTransformer,
    inputs: InputMaker,
    tokens: Path,
    batch_size: int,
    num_workers: int,
    on_damaged: OnDamaged = "stop",
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One pass over a token set, every image once over all ranks: see `score_report`. Collective.

    Args:
        on_damaged: "skip" leaves images out that cannot be read; how many is `damaged_samples` in the result.
        on_batch: called after every batch.

    Raises:
        UserError: on every rank, when one has a damaged image under "stop", or a label beyond the model's classes.
    """
    parts, num_damaged = [], 0
    batches = evaluation_batches(
        tokens,
        None,
        batch_size=batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        num_workers=num_workers,
        on_damaged=on_damaged,
        num_classes=model.config.num_classes,
    )
    for batch in lockstep(batches):
        report_damaged(batch.damaged)
        num_damaged += len(batch.damaged)
        model_inputs = inputs.evaluation(batch)
        logits_BLV = model(model_inputs.labels_B, model_inputs.inputs_BLZ).logits_BLV.float()
        ce_BL = F.cross_entropy(logits_BLV.transpose(1, 2), model_inputs.tokens_BL, reduction="none")
        weight_B = batch.weight_B.to(ce_BL.device)
        parts.append(sum_scales(ce_BL, logits_BLV, model_inputs.tokens_BL, model.schedule, weight_B))
        on_batch()
    scores = add_up(parts)
    sums = [scores.ce_sum_S, scores.correct_S, scores.tokens_S, scores.tokens_S.new_tensor([num_damaged])]
    *summed, damaged = distributed.sums_over_ranks(sums)
    report = score_report(ScaleScores(*summed))
    return report if damaged == 0 else {**report, "damaged_samples": int(damaged)}
