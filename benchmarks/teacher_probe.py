"""What a teacher knows of the classes: `python benchmarks/teacher_probe.py TRAIN HELDOUT --teacher NAME --weights DIR`.

A linear probe: logistic regression from a teacher's frozen features to the class, fitted on one image set and scored on
another. `cells` sees the features of all cells, `mean` their mean alone, and `pixels` the image at 16 x 16 (what no
teacher is needed for).

Legend: N images, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from mepa_ds.command_line import entry
from mepa_ds.command_line.paths import PathOrName
from mepa_ds.data.shard_set import LABEL_EXTENSION, spread
from mepa_ds.data.views import CENTRE, Views
from mepa_ds.data_tools.precompute_sets import RunOptions, batches_of, open_images, stored_square, to_device
from mepa_ds.distributed import device_of, read_launch
from mepa_ds.errors import UserError
from mepa_ds.teachers.base import Teacher, resize
from mepa_ds.teachers.registry import build_teacher

_BATCH = 64


@dataclass(frozen=True)
class Probe:
    """A linear probe of a teacher's features."""

    train: tyro.conf.Positional[Path]
    """Directory of the image set on which the probe is fitted; it needs labels."""
    heldout: tyro.conf.Positional[Path]
    """Directory of the image set on which it is scored."""
    teacher: str
    """As for data_tools/precompute.py."""
    weights: PathOrName
    """Its directory or checkpoint, or `hub`."""
    max_images: int = 10_000
    """Images of each set at most, spread evenly over it."""

    def __call__(self) -> None:
        teacher = build_teacher(self.teacher, self.weights).to(device_of(read_launch()))
        train, labels = self._features(self.train, teacher)
        heldout, wanted = self._features(self.heldout, teacher)
        for name in train:
            accuracy = _accuracy(train[name], labels, heldout[name], wanted)
            print(f"{teacher.name} {name:6}  {accuracy:.1%} of {len(wanted)} held-out images", flush=True)

    def _features(self, directory: Path, teacher: Teacher) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.int64]]:
        """The features of a set by name, each (N, D), and its labels (N,)."""
        images = open_images(directory)
        samples = spread(len(images), self.max_images)
        batches = batches_of(
            images, samples, Views.parse(CENTRE, stored_square(images)).crop, _BATCH, RunOptions.workers
        )
        parts: dict[str, list[torch.Tensor]] = {"cells": [], "mean": [], "pixels": []}
        labels: list[int] = []
        for batch in tqdm(batches, directory.name, -(-len(samples) // _BATCH)):
            images_B3HW = to_device(batch, device_of(read_launch()))
            patches_BNC = teacher.patch_features(images_B3HW)
            found = (patches_BNC.flatten(1), patches_BNC.mean(1), resize(images_B3HW, (16, 16)).flatten(1))
            for name, features_BD in zip(parts, found, strict=True):
                parts[name].append(features_BD.cpu())
            for item in batch:
                if LABEL_EXTENSION not in item.members:
                    raise UserError(f"{directory}: sample {item.key!r} has no label; a probe needs labelled images")
                labels.append(int(item.members[LABEL_EXTENSION]))
        return {name: torch.cat(blocks).numpy() for name, blocks in parts.items()}, np.array(labels)


def _accuracy(
    train_ND: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    test_ND: NDArray[np.float32],
    wanted_N: NDArray[np.int64],
) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=100, tol=1e-2))
    return float((probe.fit(train_ND, labels_N).predict(test_ND) == wanted_N).mean())


def main() -> None:
    tyro.cli(Probe, description=__doc__)()


if __name__ == "__main__":
    entry.run(main)
