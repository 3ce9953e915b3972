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
    """How a loader reads. Only `unique_images` changes which samples there are, and their order."""

    num_workers: int = 0
    """Threads that read ahead (of images: processes that decode); 0 reads when asked, in this process."""
    pin_memory: bool = False
    """Batches in pinned memory, for asynchronous copies to a GPU. Image batches always are, where there is a GPU."""
    on_damaged: OnDamaged = "stop"
    """What to do about a sample that cannot be read: "stop" raises, "skip" puts another one in its place and says so in
    the batch's `damaged`."""
    num_classes: int | None = None
    """Of the model: labels are checked against it. None: they are not (image batches never are)."""
    unique_images: int | None = None
    """Of an endless stream: it repeats that many samples of the set (see mepa_ds.data.order). None: all."""


DEFAULTS = LoaderOptions()
LoaderT = TypeVar("LoaderT", bound=Callable[..., Any])


def grouped(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the keywords with rank and world_size as `ranks`, and the fields of LoaderOptions as `options`.

    Raises TypeError for a keyword beside the group that it belongs to.
    """
    rest = dict(settings)
    for group, kind, names in (
        ("ranks", Ranks, Ranks._fields),
        ("options", LoaderOptions, tuple(field.name for field in fields(LoaderOptions))),
    ):
        if members := {name: rest.pop(name) for name in names if name in rest}:
            if group in rest:
                raise TypeError(f"{', '.join(members)}: {group} has it already; give it there")
            rest[group] = kind(**members)
    return rest


def takes_old_keywords(loader: LoaderT, single_pass: Callable[..., Any] | None = None) -> LoaderT:
    """Until version 0.3 a loader also takes `rank`, `world_size` and each of LoaderOptions as keywords of its own.

    `single_pass` is what `train=False` asked for.
    """

    @functools.wraps(loader)
    def load(*arguments: Any, **settings: Any) -> Any:
        once = single_pass is not None and not settings.pop("train", True)
        new = grouped(settings)
        if once or new.keys() != settings.keys():
            warnings.warn("a loader's keywords are ranks and options now", DeprecationWarning, stacklevel=2)
        if once and single_pass is not None:
            kept = {name: new[name] for name in ("batch_size", "image_side", "ranks") if name in new}
            return single_pass(*arguments, **kept, num_workers=new.get("options", DEFAULTS).num_workers)
        return loader(*arguments, **new)

    return cast(LoaderT, load)
