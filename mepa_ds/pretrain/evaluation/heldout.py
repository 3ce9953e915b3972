"""Cross-entropy and accuracy on held-out token maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mepa_ds import distributed
from mepa_ds.data.lockstep import lockstep, report_damaged
from mepa_ds.data.options import DEFAULTS, LoaderOptions
from mepa_ds.data.training import evaluation_batches
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.cross_entropy import token_scores
from mepa_ds.objective.objective import ScaleScores, sum_scales
from mepa_ds.objective.reports import add_up, score_report
from mepa_ds.pretrain.inputs import InputMaker


def heldout_scores(
    model: NextScaleTransformer,
    inputs: InputMaker,
    tokens: Path,
    batch_size: int,
    options: LoaderOptions = DEFAULTS,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Scores a token set in one pass: each image once over all ranks. For the result see `score_report`. Collective.

    Args:
        options: on_damaged="skip" leaves out images that cannot be read; the result then gives their number as
            `damaged_samples`.
        on_batch: called after every batch.

    Raises:
        UserError: on every rank, when one rank has a damaged image under "stop", or a label beyond the model's classes.
    """
    parts, num_damaged = [], 0
    batches = evaluation_batches(
        tokens,
        None,
        batch_size=batch_size,
        ranks=distributed.ranks(),
        options=replace(options, num_classes=model.config.num_classes),
    )
    for batch in lockstep(batches):
        report_damaged(batch.damaged)
        num_damaged += len(batch.damaged)
        model_inputs = inputs.evaluation(batch)
        logits_BLV = model(model_inputs.labels_B, model_inputs.inputs_BLZ).logits_BLV
        ce_BL, hits_BL = token_scores(logits_BLV, model_inputs.tokens_BL)
        parts.append(sum_scales(ce_BL, hits_BL, model.schedule, batch.weight_B.to(ce_BL.device)))
        on_batch()
    scores = add_up(parts)
    sums = [scores.ce_sum_S, scores.correct_S, scores.tokens_S, scores.tokens_S.new_tensor([num_damaged])]
    *summed, damaged = distributed.sums_over_ranks(sums)
    report = score_report(ScaleScores(*summed))
    return report if damaged == 0 else {**report, "damaged_samples": int(damaged)}
