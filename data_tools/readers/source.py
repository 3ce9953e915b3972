"""The interface of readers: images by number, each with a label. A new kind of dataset is one file in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable


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
