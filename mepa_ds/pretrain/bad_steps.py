"""Steps that were skipped because a gradient was not finite.

They are counted, and their images are noted for inspection. Too many in a row make the run go back to a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from mepa_ds import distributed, log
from mepa_ds.data.training import TrainingBatch
from mepa_ds.errors import DivergedError
from mepa_ds.files import write_json

_MAX_ROLLBACKS = 3


class BadSteps:
    """Counts steps that were skipped because a gradient was not finite."""

    def __init__(self, limit: int, directory: Path):
        self._limit, self.directory = limit, directory
        self.in_a_row = 0
        self.total = 0
        """The count over the whole run: new starts and rollbacks do not reset it."""
        self._cause = ""
        self._rollbacks: dict[int, int] = {}

    @property
    def rollback_due(self) -> bool:
        """Whether it is time to go back to a checkpoint. The answer is the same on every rank."""
        return self.in_a_row >= self._limit

    def note_good(self) -> None:
        """Notes that a step was applied, which ends a row of bad steps."""
        self.in_a_row = 0

    def note(self, step: int, batches: Iterable[TrainingBatch], losses: Iterable[Tensor], cause: str) -> None:
        """Notes that a step was skipped, and writes the keys of its images to `directory/step_<step>_rank_<rank>.json`.

        `cause` says what was not finite.
        """
        self.in_a_row += 1
        self.total += 1
        self._cause = cause
        content = {
            "step": step,
            "not_finite": cause,
            "losses": [str(float(loss)) for loss in losses],
            "positions": [batch.positions_B.tolist() for batch in batches],
            "keys": [list(batch.keys) for batch in batches],
        }
        path = self.directory / f"step_{step:08d}_rank_{distributed.rank():05d}.json"
        try:
            write_json(path, content)
        except OSError as error:  # a full disk does not end a run
            log.note(f"rank {distributed.rank()}: warning: {path} cannot be written: {error}")

    def rolled_back(self, step: int, to_step: int | None) -> None:
        """Notes that the run went back from `step` to the checkpoint of `to_step` (None: there is none).

        Raises DivergedError when going back has not helped, or when there is no checkpoint.
        """
        count = 0 if to_step is None else self._rollbacks.get(to_step, 0) + 1
        if to_step is None or count > _MAX_ROLLBACKS:
            why = "and there is no checkpoint yet" if to_step is None else f"also after {_MAX_ROLLBACKS} rollbacks"
            raise DivergedError(
                f"guards.max_bad_steps: {self.in_a_row} steps in a row were skipped ({self._cause}: not finite), "
                f"{why}; the keys of their images are in {self.directory}. Look at these, or lower optim.base_lr",
                step,
            )
        self._rollbacks[to_step] = count
        self.in_a_row = 0


def check_divergence(ce: float, limit: float | None, step: int) -> None:
    """Raises DivergedError, on every rank, when the mean cross-entropy of a record is above guards.diverged_above.

    `ce` is the same on every rank. NaN, of records whose steps were all skipped, is left to `BadSteps`.
    """
    if limit is not None and ce > limit:
        raise DivergedError(
            f"the run has diverged: the cross-entropy is {ce:.4g} at step {step}, above guards.diverged_above "
            f"({limit:.4g}); lower optim.base_lr, and choose another output_dir or remove this one",
            step,
        )
