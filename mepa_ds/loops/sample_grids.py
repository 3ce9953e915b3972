"""Pictures of how far a run has come: the same classes and the same random numbers every time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mepa_ds import distributed
from mepa_ds.errors import UserError
from mepa_ds.images import save_grid
from mepa_ds.loops.sampling import NonFiniteLogitsError, sample
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer.tokenizer import Tokenizer

# Rows and columns of a grid.
_CLASSES, _PER_CLASS = 8, 8


class SampleGrids:
    """One row a class, for up to 8 classes spread over all of them."""

    def __init__(self, tokenizer: Tokenizer, directory: Path, num_classes: int, seed: int):
        self._tokenizer = tokenizer
        self._directory, self._seed = directory, seed
        rows = min(_CLASSES, num_classes)
        self._classes = [row * num_classes // rows for row in range(rows)]

    def write(self, model: NextScaleTransformer, step: int, on_row: Callable[[], None]) -> Path:
        """Samples on every rank, since experts may lie on all of them; the main rank writes. Collective.

        `on_row` is called after every class. Raises UserError, on every rank, when logits are not finite on one.
        """
        path = self._directory / f"step_{step:08d}.png"
        rows = []
        for row, label in enumerate(self._classes):
            first = row * _PER_CLASS
            labels = [label] * _PER_CLASS
            error: UserError | None = None
            try:
                rows.append(sample(model, self._tokenizer, labels, seed=self._seed, first_index=first).cpu())
            except NonFiniteLogitsError as raised:
                error = raised
            distributed.agree(error)
            on_row()
        if distributed.is_main():
            save_grid(torch.cat(rows), path, columns=_PER_CLASS)
        return path
