"""Scores of images that the model generates while it trains (log.score), by the code of `mepa evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mepa_ds import distributed
from mepa_ds.config.pretrain import ScoreConfig
from mepa_ds.errors import UserError
from mepa_ds.evaluation.feature_spaces import StoredFeatures
from mepa_ds.evaluation.score_files import cache_beside
from mepa_ds.evaluation.scorer import Scorer, ScorerOptions, gather_features
from mepa_ds.generation.sampling import sample
from mepa_ds.images.pictures import to_uint8
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer.tokenizer import Tokenizer


class GeneratedScores:
    """Generates log.score.images images on all ranks and scores them.

    Image i is a function of the weights, the run's seed and i. Batches are the same whatever the number of ranks, and
    so are the scores.

    `beat` is called while the main rank works alone: the others wait, and none of them hangs.

    Raises:
        UserError: at construction, on every rank: the reference, a feature space or the classifier cannot be used.
    """

    def __init__(self, score: ScoreConfig, tokenizer: Tokenizer, num_classes: int, seed: int, beat: Callable[[], None]):
        self._score, self._tokenizer, self._seed = score, tokenizer, seed
        self._labels = [number * num_classes // score.images for number in range(score.images)]
        options = ScorerOptions(
            features=score.features,
            inception=score.inception,
            classifier=score.classifier,
            cache=cache_beside(score.reference),
            seed=seed,
        )
        self._beat = beat
        side = tokenizer.config.image_side
        error: UserError | None = None
        try:
            # The main rank alone compares; the others only need what turns images into features.
            if not distributed.is_main():
                self._scorer = Scorer.open(None, options, side)
        except UserError as raised:
            error = UserError(f"log.score: {raised}")
        distributed.agree(error)
        # The features of a large reference take minutes.
        opened = distributed.wait_for_main(partial(self._open, options), beat)
        if opened is not None:
            self._scorer = opened

    def take(self, model: NextScaleTransformer, on_batch: Callable[[], None]) -> dict[str, Any]:
        """The scores by name and their `protocol`, on the main rank; {} on the others. Collective, since experts may
        lie on all ranks.

        `on_batch` is called after every round of batches; it may raise, on all ranks.

        Raises:
            UserError: on every rank; logits or features are not finite on one, or the scores cannot be computed.
        """
        size, ranks = self._score.batch, distributed.ranks()
        batches = [range(start, min(start + size, len(self._labels))) for start in range(0, len(self._labels), size)]
        found: list[dict[str, Tensor]] = []
        numbers: list[int] = []
        for first in range(0, len(batches), ranks.world_size):
            # A rank that has none left takes part with the last batch, which is another rank's.
            mine = batches[min(first + ranks.rank, len(batches) - 1)]
            features, error = self._features(model, mine)
            distributed.agree(error)
            if first + ranks.rank < len(batches):
                found.append(features)
                numbers += mine
            on_batch()
        names = found[0] if found else {}
        gathered = gather_features({name: torch.cat([part[name] for part in found]) for name in names}, numbers)
        scores = distributed.wait_for_main(partial(self._scorer.score, gathered, self._labels), self._beat) or {}
        if scores:
            kept = ("images", "cfg", "top_k", "top_p", "batch")
            scores["protocol"] |= {"sampling": self._score.model_dump(include=set(kept)), "seed": self._seed}
        return scores

    def _open(self, options: ScorerOptions) -> Scorer:
        """On the main rank. Raises UserError for what could not be scored, or not rightly, once images are there."""
        reference, side = self._score.reference, self._tokenizer.config.image_side
        try:
            scorer = Scorer.open(reference, options, side)
            if stored := [space.name for space in scorer.spaces if isinstance(space, StoredFeatures)]:
                raise UserError(f"features: {stored[0]} is a file of features, which are not of images generated here")
            scorer.check_samples(len(self._labels), self._labels)
            real = None if scorer.reference is None else scorer.reference.images
            if real is not None and real.shape[1:3] != (side, side):
                raise UserError(
                    f"{reference}: images of {real.shape[1]} x {real.shape[2]} pixels, but this run generates {side} x "
                    f"{side}; give a reference of that size, or a shard set"
                )
        except UserError as error:
            raise UserError(f"log.score: {error}") from error
        return scorer

    def _features(self, model: NextScaleTransformer, batch: range) -> tuple[dict[str, Tensor], UserError | None]:
        score = self._score
        try:
            images_B3HW = sample(
                model,
                self._tokenizer,
                self._labels[batch.start : batch.stop],
                cfg=score.cfg,
                top_k=score.top_k,
                top_p=score.top_p,
                seed=self._seed,
                first_index=batch.start,
            )
            return self._scorer.features(to_uint8(images_B3HW), batch.start, "generated images"), None
        except UserError as error:
            return {}, error

    def line(self, scores: dict[str, Any]) -> str:
        """The scores that a person looks at first, for the log."""
        first = [name for name in scores if name in ("fid", "class_agreement") or name.endswith(".fd")]
        shown = ", ".join(f"{name} {scores[name]:.4g}" for name in first if scores[name] is not None)
        return f"{self._score.images} generated images: {shown}"
