"""What all loaders are told: how to read, and what to do about samples that cannot be read."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast

from mepa_ds.data.shards.damaged import OnDamaged
from mepa_ds.distributed import Ranks


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


LoaderT = TypeVar("LoaderT", bound=Callable[..., Any])


def takes_old_keywords(loader: LoaderT, single_pass: Callable[..., Any] | None = None) -> LoaderT:
    """Until version 0.3 a loader also takes `rank`, `world_size` and each of LoaderOptions as keywords of its own.

    `single_pass` is what `train=False` asked for.
    """
    names = {field.name for field in fields(LoaderOptions)}

    @functools.wraps(loader)
    def load(*arguments: Any, **settings: Any) -> Any:
        old = settings.keys() & (names | {"rank", "world_size", "train"})
        if not old:
            return loader(*arguments, **settings)
        warnings.warn(f"{', '.join(sorted(old))}: give ranks and options instead", DeprecationWarning, stacklevel=2)
        settings["ranks"] = Ranks(settings.pop("rank", 0), settings.pop("world_size", 1))
        options = {name: settings.pop(name) for name in names & settings.keys()}
        if single_pass is not None and not settings.pop("train", True):
            kept = {name: settings[name] for name in ("batch_size", "image_side", "ranks")}
            return single_pass(*arguments, **kept, num_workers=options.get("num_workers", 0))
        return loader(*arguments, **settings, options=LoaderOptions(**options))

    return cast(LoaderT, load)
