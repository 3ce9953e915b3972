"""Features of a reference's images, computed once and kept beside it.

Shapes: B images of a batch, M reference images, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mepa_ds import log
from mepa_ds.evaluation.inception import SPATIAL
from mepa_ds.evaluation.references import Images
from mepa_ds.evaluation.space import INCEPTION, FeatureSpace, check_finite
from mepa_ds.progress import Progress
from mepa_ds.weights.directories import write_safetensors
from mepa_ds.weights.file_checks import check_safetensors

EXTRAS = {INCEPTION: (SPATIAL,)}
"""What is kept of a space beside its features: it has statistics of its own."""
_BATCH = 256  # images in memory at a time


@dataclass(frozen=True)
class KeptFeatures:
    """A directory (None: nothing is kept), and what features depend on beside the space: the images, the device."""

    directory: Path | None
    fingerprint: str
    device_type: str

    def read_or_compute(self, space: FeatureSpace, images: Images) -> dict[str, Tensor]:
        """By name, (M, D) each.

        Raises:
            UserError: features that are not finite.
        """
        wanted = (space.name, *EXTRAS.get(space.name, ()))
        path = self._path(space)
        if path is not None and path.exists():
            try:
                return _read(path, wanted, len(images))
            except (OSError, SafetensorError, ValueError, RuntimeError, TypeError) as error:
                log.note(f"warning: {path}: cannot be used ({error}); the reference's features are computed again")
        found = _compute(space, images, wanted)
        if path is not None:
            try:
                write_safetensors(path, found, {"space": space.name})
            except OSError as error:
                log.note(f"{path}: the reference's features are not kept ({error.strerror or error})")
        return found

    def _path(self, space: FeatureSpace) -> Path | None:
        if self.directory is None:
            return None
        facts = repr((self.fingerprint, space.name, space.identity, space.preprocessing, self.device_type))
        digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
        return self.directory / f"{space.name}-{digest}.safetensors"


def _read(path: Path, wanted: Sequence[str], count: int) -> dict[str, Tensor]:
    """Raises ValueError for features of something else, other errors for a damaged file."""
    check_safetensors(path)
    found = load_file(path)
    if any(name not in found or found[name].ndim != 2 or len(found[name]) != count for name in wanted):
        raise ValueError(f"it does not hold {' and '.join(wanted)} of {count} images")
    return found


def _compute(space: FeatureSpace, images: Images, wanted: Sequence[str]) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    done = 0
    with Progress(total=len(images), desc=f"reference: {space.name}", unit="image") as bar:
        for pixels_BHW3 in images.batches(_BATCH):
            outputs = space.outputs(pixels_BHW3)
            found = {name: outputs[name] for name in wanted}
            check_finite(found, "the reference", done)
            for name, rows in found.items():
                parts[name].append(rows)
            done += len(pixels_BHW3)
            bar.update(len(pixels_BHW3))
    return {name: torch.cat(rows) for name, rows in parts.items()}
