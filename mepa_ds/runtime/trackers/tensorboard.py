"""TensorBoard: `tensorboard --logdir RUN/tensorboard`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mepa_ds.runtime.trackers.tracker import Pixels, in_a_line, rests


class TensorBoard:
    """Writes scalars and pictures for TensorBoard.

    After an error (a full disk) its writer is of no use, so there is no writer until the next rewind or start.
    """

    def __init__(self, directory: Path, step: int):
        self._directory = directory
        self._writer: Any = None
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Opens a new writer, which makes TensorBoard hide earlier numbers of steps after `step`."""
        self.close()
        with self._giving_up():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._directory), purge_step=step + 1)

    def add(self, scalars: dict[str, float], step: int) -> None:
        if self._writer is not None:
            with self._giving_up():
                for key, value in scalars.items():
                    self._writer.add_scalar(key, value, step)

    def add_picture(self, name: str, pixels_HW3: Pixels, step: int) -> None:
        if self._writer is not None:
            with self._giving_up():
                self._writer.add_image(name, pixels_HW3, step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            with self._giving_up():
                self._writer.close()
        self._writer = None

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # its thread fails to write to a full disk, and the next call raises the error
            self._writer = None
            rests(f"{self._directory} cannot be written ({in_a_line(error)})")
