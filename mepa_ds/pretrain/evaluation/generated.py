"""Scores of images that the model generates while it trains (log.score), by the code of `mepa evaluate`.

Shapes: B images of a batch, N images in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mepa_ds import distributed
from mepa_ds.config.pretrain import ScoreConfig
from mepa_ds.generation.sampling import sample
from mepa_ds.images.pictures import to_uint8
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer.tokenizer import Tokenizer


class GeneratedScores:
    """Generates log.score.images images on all ranks and scores them.

    Image i is a function of the weights, the run's seed and i; batches are the same whatever the number of ranks, so
    that the scores are too.

    Raises:
        UserError: at construction, on every rank: the reference, a feature space or the classifier cannot be used.
    """

    def __init__(self, score: ScoreConfig, tokenizer: Tokenizer, num_classes: int, seed: int):
        self._score, self._tokenizer, self._seed = score, tokenizer, seed
        self._labels = [number * num_classes // score.images for number in range(score.images)]
        self._scorer = None

    def take(self, model: NextScaleTransformer, on_batch: Callable[[], None]) -> dict[str, Any]:
        """The scores, on every rank. Collective, since experts may lie on all ranks.

        `on_batch` is called after every round of batches; it may raise, on all ranks.

        Raises:
            UserError: on every rank; the model's logits are not finite on one.
        """
        size, ranks = self._score.batch, distributed.ranks()
        batches = [range(start, min(start + size, len(self._labels))) for start in range(0, len(self._labels), size)]
        found: list[dict[str, Tensor]] = []
        for first in range(0, len(batches), ranks.world_size):
            # A rank that has none left takes part with the last one, whose features do not count twice.
            number = min(first + ranks.rank, len(batches) - 1)
            features = distributed.of_all(self._features(model, batches[number]))
            found += features[: len(batches) - first]
            on_batch()
        names = found[0]
        return self._scorer.score({name: torch.cat([part[name] for part in found]) for name in names}, self._labels)
