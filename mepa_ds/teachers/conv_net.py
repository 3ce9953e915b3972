"""Teachers that need no download and know more than texture: a small convolutional network, trained on the user's own
images. `contrastive` learns without labels (SimCLR, arXiv 2002.05709), `supervised` from the images' classes.

Shape legend: B batch, H image height, W image width, N cells (row-major), C teacher width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from mepa_ds.config.base import Section
from mepa_ds.config.values import PositiveInt
from mepa_ds.teachers.base import Teacher
from mepa_ds.weights.directories import load_strict, read_pretrained, save_pretrained
from mepa_ds.weights.file_checks import check_fits

Kind = Literal["contrastive", "supervised"]
KINDS: tuple[Kind, ...] = ("contrastive", "supervised")
_STEM = 32
"""Channels of the first convolution; every halving of the side doubles them, up to the teacher's width."""


class ConvNetConfig(Section):
    """Stored as `config.json` beside the weights."""

    grid_side: PositiveInt = 16
    """Cells along one side of an image."""
    pixels_per_cell: PositiveInt = 8
    """Images are resized so that a cell has this many pixels along one side: 4, 8 or 16."""
    width: PositiveInt = 128
    """C, the features of a cell."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial weights, order and augmentation."""
    steps: PositiveInt = 300
    """Steps of the training."""
    batch: Annotated[int, Field(ge=2)] = 128
    """Images a step."""
    lr: Annotated[float, Field(gt=0)] = 2e-3
    """Peak of AdamW's rate, a cosine over the steps. No option sets it; the stored config says all that was used."""
    fitted_on: str = ""
    """The images it was trained on, as the fitting tool names them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pixels_per_cell not in (4, 8, 16):
            raise ValueError(f"pixels_per_cell must be 4, 8 or 16 (halvings of the side); got {self.pixels_per_cell}")
        return self


class _Residual(nn.Module):
    """Two convolutions of 3 x 3 beside the identity, each after a batch norm and a ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            *(
                layer
                for _ in range(2)
                for layer in (
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                    nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                )
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ConvNet(nn.Sequential):
    """(B, 3, H, W) -> (B, C, H / cell, W / cell), each channel of mean 0 and variance 1 over images and cells.

    Without this standardisation all cells share a large mean, and a cosine to it is high whatever the image shows.
    """

    def __init__(self, config: ConvNetConfig):
        halvings = config.pixels_per_cell.bit_length() - 1
        widths = [min(_STEM * 2**stage, config.width) for stage in range(halvings)]
        layers: list[nn.Module] = []
        for before, after in zip([3, *widths], widths, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), _Residual(after)]
        last = widths[-1]
        layers += [_Residual(last), nn.BatchNorm2d(last), nn.ReLU(), nn.Conv2d(last, config.width, 1, bias=False)]
        super().__init__(*layers, nn.BatchNorm2d(config.width, affine=False))


class ConvTeacher(Teacher):
    """A trained `ConvNet`. Its CLS token is the mean of the cells."""

    def __init__(self, kind: Kind, config: ConvNetConfig, name: str | None = None):
        super().__init__(name or kind, config.width, config.grid_side, config.pixels_per_cell)
        self.kind, self.config = kind, config
        self.net = ConvNet(config)

    @property
    def has_cls(self) -> bool:
        return True

    def save(self, directory: Path) -> None:
        save_pretrained(directory, self.config, self.state_dict(), self.kind)

    @classmethod
    def load(cls, kind: Kind, directory: Path, name: str | None = None) -> ConvTeacher:
        """Reads what `save` wrote. Raises UserError for anything else."""
        config, state = read_pretrained(directory, ConvNetConfig, kind)
        check_fits(lambda: cls(kind, config), state, str(directory))
        teacher = cls(kind, config, name)
        load_strict(teacher, state, str(directory))
        return teacher.freeze()

    def _features(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        map_BCHW = self.net(images_B3HW)
        return map_BCHW.flatten(2).transpose(1, 2), map_BCHW.mean((2, 3))


def nt_xent(z_2BD: Tensor, temperature: float = 0.2) -> Tensor:
    """SimCLR's loss of two views of B images, (2, B, D): each view's other view among the 2B - 1 others, by cosine."""
    z_ND = F.normalize(z_2BD.flatten(0, 1), dim=-1)
    similarity_NN = (z_ND @ z_ND.T / temperature).fill_diagonal_(float("-inf"))
    half = z_2BD.shape[1]
    return F.cross_entropy(similarity_NN, torch.arange(2 * half, device=z_ND.device).roll(half))
