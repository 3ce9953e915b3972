"""`mepa data fit-teacher`: teachers that need no download, made from the training images themselves.

Shape legend: N images, H image height, W image width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from torch import Tensor

from mepa_ds import distributed, log
from mepa_ds.command_line.remote import RemoteSchemes
from mepa_ds.config.base import Section, validate
from mepa_ds.data.remote.schemes import allow
from mepa_ds.data.shard_set import LABEL_EXTENSION, ShardSet, spread
from mepa_ds.data.shards.index import images_identity
from mepa_ds.data.shards.offset_index import label_number
from mepa_ds.data.views import CENTRE, Views
from mepa_ds.data_tools.precompute_sets import RunOptions, batches_of, open_images, stored_square, to_device
from mepa_ds.errors import UserError
from mepa_ds.progress import Progress
from mepa_ds.teachers.base import Teacher, resize
from mepa_ds.teachers.conv_fitting import fit_conv_teacher
from mepa_ds.teachers.conv_net import ConvNetConfig, Kind
from mepa_ds.teachers.patch_pca import KIND as PATCH_PCA
from mepa_ds.teachers.patch_pca import PatchPca, PatchPcaConfig
from mepa_ds.weights.directories import CONFIG_NAME, read_config

_BATCH = 64


@dataclass(frozen=True)
class FitTeacher:
    """Makes a teacher that needs no download from the images themselves."""

    kind: tyro.conf.Positional[Literal["patch-pca", "contrastive", "supervised"]]
    """patch-pca: whitened PCA of local image patches. A small convolutional network: contrastive, trained without
    labels to know an image again in two crops; supervised, trained on the images' classes."""
    images: tyro.conf.Positional[Path]
    """Directory of the image set (the training images)."""
    out: Path
    """Directory of the teacher; give it to `features --teacher KIND --weights`."""
    grid_side: int = 16
    """Cells along one side of an image."""
    pixels_per_cell: int = 8
    """Images are resized so that a cell has this many pixels along one side; 4, 8 or 16 for a network."""
    window: int | None = None
    """patch-pca: side of the square window of pixels that a cell looks at [default: 16]."""
    width: int | None = None
    """Features of a cell [default: 64 principal components, or 128 channels of a network]."""
    max_images: int = 10_000
    """Fit on this many images, spread evenly over the set. A network holds them in memory."""
    steps: int | None = None
    """A network: training steps of 128 images, or of all if there are fewer [default: 300]."""
    remote_schemes: RemoteSchemes = ()

    def __call__(self) -> None:
        allow(self.remote_schemes)
        images = open_images(self.images)
        samples = spread(len(images), self.max_images)
        config = self._config(len(samples), images_identity(images.index))
        if (self.out / CONFIG_NAME).exists():
            if read_config(self.out, type(config), self.kind) != config:
                raise UserError(
                    f"--out: {self.out}: holds a teacher fitted otherwise; give another directory or remove it"
                )
            log.say(f"{self.out}: fitted already, kept")
            return
        teacher = self._fit(images, samples, config)
        log.say(
            f"{self.out}: {teacher.name} of width {teacher.width}, fitted on {len(samples)} images, {teacher.identity}"
        )

    def _config(self, num_images: int, identity: str) -> Section:
        """Raises UserError for values that make no teacher, and for options of the other kind."""
        is_pca = self.kind == PATCH_PCA
        foreign, value = ("steps", self.steps) if is_pca else ("window", self.window)
        if value is not None:
            raise UserError(f"--{foreign}: fit-teacher {self.kind} has no {foreign}; leave it out")
        given = {"width": self.width, "window": self.window, "steps": self.steps}
        settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        settings |= {"grid_side": self.grid_side, "pixels_per_cell": self.pixels_per_cell}
        settings["fitted_on"] = f"{num_images} images of {identity}"
        if not is_pca:
            settings["batch"] = min(ConvNetConfig().batch, num_images)
        return validate(PatchPcaConfig if is_pca else ConvNetConfig, settings, f"fit-teacher {self.kind}")

    def _fit(self, images: ShardSet, samples: list[int], config: Section) -> Teacher:
        views = Views.parse(CENTRE, stored_square(images))
        batches = batches_of(images, samples, views.crop, _BATCH, RunOptions.workers)
        items = Progress(batches, "fit" if self.kind == PATCH_PCA else "read", -(-len(samples) // _BATCH))
        cpu = torch.device("cpu")
        if isinstance(config, PatchPcaConfig):
            pca = PatchPca.fit((to_device(batch, cpu) for batch in items), config)
            pca.save(self.out)
            return pca
        assert isinstance(config, ConvNetConfig)
        side = config.grid_side * config.pixels_per_cell
        pixels: list[Tensor] = []
        labels: list[int | None] = []
        for batch in items:
            resized = resize(to_device(batch, cpu), (side, side))
            pixels.append(resized.add(1).mul(255 / 2).round().to(torch.uint8))
            labels += [_label(item.members) for item in batch]
        known = [label for label in labels if label is not None]
        labels_N = torch.tensor(known) if len(known) == len(labels) else None
        device = distributed.device_of(distributed.read_launch())
        network = fit_conv_teacher(cast(Kind, self.kind), torch.cat(pixels), labels_N, config, device)
        network.save(self.out)
        return network


def _label(members: dict[str, bytes]) -> int | None:
    return label_number(members[LABEL_EXTENSION]) if LABEL_EXTENSION in members else None
