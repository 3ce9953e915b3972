"""Compares two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from mepa_ds.checkpoint.state import read_state
from mepa_ds.checkpoint.store import read_tensors, stored_tensors
from mepa_ds.config.changes import changed

_COMPARED_AT_ONCE = 32


def differences(first: Path, second: Path) -> Iterator[str]:
    """Yields a line for each difference between two checkpoints; no line if they are the same run state bit by bit."""
    ours, theirs = (asdict(read_state(path)) for path in (first, second))
    yield from (f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed(ours, theirs).items())
    left, right = stored_tensors(first), stored_tensors(second)
    for name in sorted(left.keys() ^ right.keys()):
        yield f"{name}: only in {first if name in left else second}"
    common = [name for name in sorted(left.keys() & right.keys()) if left[name].size == right[name].size]
    for name in sorted((left.keys() & right.keys()) - set(common)):
        yield f"{name}: {left[name].size.numel()} elements -> {right[name].size.numel()}"
    for start in range(0, len(common), _COMPARED_AT_ONCE):
        names = common[start : start + _COMPARED_AT_ONCE]
        a, b = read_tensors(first, names), read_tensors(second, names)
        for name in names:
            if not torch.equal(a[name], b[name]):
                change = (a[name].double() - b[name].double()).abs().max()
                yield f"{name}: {int((a[name] != b[name]).sum())} of {len(a[name])} differ, by at most {change:.3e}"
