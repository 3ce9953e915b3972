"""Pictures that show the progress of a run: the same classes and the same random numbers every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mepa_ds import distributed
from mepa_ds.errors import UserError
from mepa_ds.generation.class_names import caption, spread_classes, which_of
from mepa_ds.generation.sampling import NonFiniteLogitsError, sample
from mepa_ds.images.pictures import save_grid
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer.tokenizer import Tokenizer

_MOST_CLASSES, _OF_MANY, _PER_CLASS = 16, 8, 8


class UnwrittenError(Exception):
    """A picture that could not be written, whatever the reason."""


class SampleGrids:
    """Grids with one row for each class: all classes if there are up to 16, else 8 that are spread over all.

    Captions give the step and, as far as they are known, the names of the classes.
    `alone`: no rank needs another rank to sample, so that a failure on one rank can be told to all.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        directory: Path,
        num_classes: int,
        seed: int,
        alone: bool,
        class_names: Sequence[str] = (),
    ):
        self._tokenizer = tokenizer
        self._directory, self._seed, self._alone = directory, seed, alone
        rows = num_classes if num_classes <= _MOST_CLASSES else _OF_MANY
        self.classes = spread_classes(num_classes, rows)
        self._which = which_of(self.classes, num_classes)
        self._captions = [caption(label, class_names) for label in self.classes]
        listed = ", ".join(map(str, self.classes))
        self.shown = "a row a class" if rows == num_classes else f"rows: classes {listed} of {num_classes}"

    def write(self, model: NextScaleTransformer, step: int, on_row: Callable[[], None]) -> Path:
        """Samples on every rank, since experts may lie on all of them; the main rank writes. Collective.

        `on_row` is called after every class.

        Raises:
            UserError: on every rank, when logits are not finite on one.
            UnwrittenError: on the main rank alone, at the end.
        """
        path = self._directory / f"step_{step:08d}.png"
        rows = []
        for row, label in enumerate(self.classes):
            first = row * _PER_CLASS
            labels = [label] * _PER_CLASS
            error: UserError | None = None
            try:
                rows.append(sample(model, self._tokenizer, labels, seed=self._seed, first_index=first).cpu())
            except NonFiniteLogitsError as raised:
                error = raised
            except Exception as raised:
                if not self._alone:
                    raise
                error = UserError(f"{type(raised).__name__}: {raised}")
            distributed.agree(error)
            on_row()
        if distributed.is_main():
            try:
                save_grid(torch.cat(rows), path, _PER_CLASS, title=f"step {step}{self._which}", rows=self._captions)
            except Exception as error:
                raise UnwrittenError(str(error)) from error
        return path
