"""Weights in the transformers library's layout, and what the library computes with them, without the library.

`fixtures/transformers/models.json` has, for tiny models and for the published ones, the config.json that the library
writes and the names and shapes of its file; `outputs.npz` the last hidden states of the tiny models, in fp32 on a CPU,
for the images and the weights of this module. `make_outputs.py` beside them made both, with the releases named in
models.json.
"""

from __future__ import annotations

import json
import math
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "fixtures" / "transformers"
GRIDS = ((4, 4), (6, 5))
"""Rows and columns of patches: as the weights' position embeddings have them, and another."""
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Tiny model -> timm's model, and what it must be given to be as tiny.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("vit_base_patch14_dinov2", {"img_size": 56}),
    "dinov2-swiglu": ("vit_giant_patch14_dinov2", {"img_size": 56}),
    "dinov2-reg": ("vit_base_patch14_reg4_dinov2", {"img_size": 56}),
    "dinov2-reg-swiglu": ("vit_giant_patch14_reg4_dinov2", {"img_size": 56}),
    "dinov3": ("vit_base_patch16_dinov3_qkvb", {"img_size": 64}),
    "dinov3-gated": ("vit_small_plus_patch16_dinov3_qkvb", {"img_size": 64}),
    "dinov3-no-bias": ("vit_7b_patch16_dinov3", {"img_size": 64}),
}
TINY_SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 3}
PUBLISHED = sorted(f"dinov2-{size}{kind}" for size in "sblg" for kind in ("", "-reg")) + [
    f"dinov3-{size}" for size in ("s", "s-plus", "b", "l", "h-plus", "7b")
]
"""Teachers that the published models are of."""


@cache
def models() -> dict[str, dict[str, Any]]:
    """Model -> {config: its config.json, shapes: name in its file -> shape}. Of published models, all blocks are like
    block 0, which alone is stored."""
    loaded: dict[str, dict[str, Any]] = json.loads((FOLDER / "models.json").read_text())["models"]
    return loaded


@cache
def outputs() -> NpzFile:
    return np.load(FOLDER / "outputs.npz")


def output(name: str, grid: tuple[int, int]) -> Tensor:
    """(1, prefix tokens and patches, C)."""
    return torch.from_numpy(outputs()[f"{name} {grid[0]}x{grid[1]}"])


def shapes_of(name: str) -> dict[str, list[int]]:
    """Of all blocks."""
    model = models()[name]
    shapes: dict[str, list[int]] = {}
    for key, shape in model["shapes"].items():
        numbers = range(model["config"]["num_hidden_layers"]) if "layer.0." in key else range(1)
        shapes |= {key.replace("layer.0.", f"layer.{number}."): shape for number in numbers}
    return shapes


def state_of(name: str) -> dict[str, Tensor]:
    return {key: weight(key, shape) for key, shape in shapes_of(name).items()}


def weight(key: str, shape: list[int]) -> Tensor:
    """Numbers that depend on the name alone, none of them 0. NumPy keeps RandomState's streams for ever."""
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if ("norm" in key.split(".")[-2] and key.endswith("weight")) or key.endswith("lambda1"):
        value = 1 + 0.3 * z
    elif len(shape) in (2, 4):
        value = z / math.sqrt(math.prod(shape[1:]))
    else:
        value = 0.3 * z
    return torch.from_numpy(value).float()


def image(patch_side: int, grid: tuple[int, int]) -> Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    z = np.random.RandomState(7).standard_normal((1, 3, grid[0] * patch_side, grid[1] * patch_side))
    return torch.from_numpy(np.tanh(z)).float()


def pixel_values(image_B3HW: Tensor) -> Tensor:
    """As the library's processors normalise it."""
    mean_311, std_311 = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return ((image_B3HW + 1) / 2 - mean_311) / std_311


def write(folder: Path, name: str, state: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """The directory as the library writes it; `config` changes its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state_of(name) if state is None else state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(models()[name]["config"] | config))
    return folder
