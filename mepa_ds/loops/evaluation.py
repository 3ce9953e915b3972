"""Held-out cross-entropy and accuracy. Reads the model, changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from mepa_ds import distributed
from mepa_ds.data.training import evaluation_batches
from mepa_ds.loops.inputs import InputMaker
from mepa_ds.loops.reports import add_up, score_report, sum_over_ranks
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.pretraining import ScaleScores, sum_scales


def heldout_scores(
    model: NextScaleTransformer,
    inputs: InputMaker,
    tokens: Path,
    batch_size: int,
    num_workers: int,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One pass over a token set, every image once over all ranks: see `score_report`. Collective.

    `on_batch` is called after every batch.
    """
    parts = []
    batches = evaluation_batches(
        tokens,
        None,
        batch_size=batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        num_workers=num_workers,
    )
    for batch in batches:
        model_inputs = inputs.evaluation(batch)
        logits_BLV = model(model_inputs.labels_B, model_inputs.inputs_BLZ).logits_BLV.float()
        ce_BL = F.cross_entropy(logits_BLV.transpose(1, 2), model_inputs.tokens_BL, reduction="none")
        weight_B = batch.weight_B.to(ce_BL.device)
        parts.append(sum_scales(ce_BL, logits_BLV, model_inputs.tokens_BL, model.schedule, weight_B))
        on_batch()
    scores = add_up(parts)
    summed = sum_over_ranks([scores.ce_sum_S, scores.correct_S, scores.tokens_S])
    return score_report(ScaleScores(*summed))
