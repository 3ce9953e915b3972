"""What all loaders are told: how to read, and what to do about samples that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass

from mepa_ds.data.shards.damaged import OnDamaged


@dataclass(frozen=True)
class LoaderOptions:
    """How a loader reads. None of it changes which samples there are, nor their order."""

    num_workers: int = 0
    """Threads that read ahead (of images: processes that decode); 0 reads when asked, in this process."""
    pin_memory: bool = False
    """Batches in pinned memory, for asynchronous copies to a GPU. Image batches always are, where there is a GPU."""
    on_damaged: OnDamaged = "stop"
    """What to do about a sample that cannot be read: "stop" raises, "skip" puts another one in its place and says so in
    the batch's `damaged`."""
    num_classes: int | None = None
    """Of the model: labels are checked against it. None: they are not (image batches never are)."""


DEFAULTS = LoaderOptions()
