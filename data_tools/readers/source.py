"""The interface of readers: images by number, each with a label. A new kind of dataset is one file in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mepa_ds.data.order import permutation


class Source(Protocol):
    """An opened dataset. It is sent to worker processes, so it pickles and opens files when asked to load."""

    name: str
    """Goes into `index.json` as the maker of the images."""
    settings: dict[str, Any]
    """The options on which the content depends (no paths). A rerun with other settings is refused."""
    classes: tuple[str, ...]
    """Class names by label."""

    def __len__(self) -> int: ...

    def label(self, number: int) -> int:
        """Label of an image, in range(len(classes))."""

    def describe(self, number: int) -> str:
        """Where an image comes from, for messages and for the fingerprint of the dataset."""

    def load(self, number: int) -> tuple[str, bytes]:
        """(extension, encoded bytes): `png`, `jpg` or `webp`; any other that Pillow reads is encoded anew."""


COPIED_FROM = "copied_from"
"""Key in `Source.settings` for what a `CopyingReader` says."""


@runtime_checkable
class CopyingReader(Protocol):
    """A reader whose `open` may copy the dataset. It can tell beforehand whether a finished set was made from it."""

    def copied_from(self) -> str | None:
        """Names the files that would be copied; None if nothing would be."""


class Reader(Protocol):
    """The options of a reader, a dataclass that becomes its command line."""

    def open(self, scratch: Path | None) -> Source:
        """Lists the dataset.

        Args:
            scratch: directory for readers that cannot read single images in place and copy them to tars first;
                None when several jobs write the set, which would each copy everything.

        Raises:
            UserError: whatever is wrong with the dataset.
        """


def num_heldout(count: int, share: float) -> int:
    """Held-out images of a class of `count`: about `share` of them, at least one of two or more, and never all."""
    return min(max(round(count * share), 1), count - 1)


def heldout_mask(labels_N: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Which images are held out: `share` of each class, drawn once and for all by the listing alone."""
    mask_N = np.zeros(len(labels_N), bool)
    for label in np.unique(labels_N):
        members = np.flatnonzero(labels_N == label)
        count = num_heldout(len(members), share)
        mask_N[members[permutation(0, 0, len(members), stream=int(label))[:count]]] = True
    return mask_N


class Half:
    """The held-out images of another source, or all of the others."""

    def __init__(self, whole: Source, share: float, is_heldout: bool):
        labels_N = np.fromiter((whole.label(number) for number in range(len(whole))), np.int64, len(whole))
        self._whole = whole
        self._numbers = np.flatnonzero(heldout_mask(labels_N, share) == is_heldout)
        self.name, self.classes, self.settings = whole.name, whole.classes, whole.settings

    def __len__(self) -> int:
        return len(self._numbers)

    def label(self, number: int) -> int:
        return self._whole.label(int(self._numbers[number]))

    def describe(self, number: int) -> str:
        return self._whole.describe(int(self._numbers[number]))

    def load(self, number: int) -> tuple[str, bytes]:
        return self._whole.load(int(self._numbers[number]))
