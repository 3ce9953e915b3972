"""Loaders' settings in one flat mapping, for tests that vary them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mepa_ds.data.options import LoaderOptions
from mepa_ds.distributed import Ranks


def grouped(settings: dict[str, Any]) -> dict[str, Any]:
    """rank and world_size as `ranks`, and what belongs to LoaderOptions as `options`."""
    rest = dict(settings)
    ranks = Ranks(rest.pop("rank", 0), rest.pop("world_size", 1))
    names = [field.name for field in fields(LoaderOptions) if field.name in rest]
    return rest | {"ranks": ranks, "options": LoaderOptions(**{name: rest.pop(name) for name in names})}
