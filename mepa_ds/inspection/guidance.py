"""Where the hidden states agree with the teacher: the cosine at each patch, for the aggregate up to each scale.

Shapes: B images, N = G x G patches, P teacher width, S scales, L positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mepa_ds.checkpoint.weights import read_projector
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.images import decode_sample
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import INDEX_NAME
from mepa_ds.data.training import read_samples
from mepa_ds.images.decoding import Colour
from mepa_ds.images.pictures import save_png, signed_to_uint8
from mepa_ds.images.resizing import fit_image
from mepa_ds.images.sheets import Pixels, draw_sheet, resized
from mepa_ds.inspection.scales import save_arrays
from mepa_ds.inspection.subject import Drawn, Picture, Subject
from mepa_ds.objective.alignment import Projector, cosine_maps
from mepa_ds.teachers.registry import build_teacher
from mepa_ds.weights.directories import load_strict

_SIDE = 80
_MAP = "viridis"


class GuidedImages(NamedTuple):
    """Training images with the teacher's features."""

    labels_B: Tensor
    tokens_BL: Tensor
    features_BNP: Tensor


def draw_guidance(subject: Subject, classes: list[int], directory: Path) -> Drawn:
    """Writes alignment.png and .npz: the first training image of each class."""
    recipe = subject.recipe
    if subject.checkpoint is None:
        return (
            "teacher alignment: exported weights have no projector, which only checkpoints hold; give the run, or one "
            "of its checkpoints (RUN/checkpoints/step_...)"
        )
    assert recipe is not None
    if recipe.objective.alignment is None or (state := read_projector(subject.checkpoint)) is None:
        return "teacher alignment: the run has no semantic guidance (objective.alignment: null)"
    if (missing := _missing_data(recipe)) is not None:
        return f"teacher alignment: {missing}"
    images = guided_images(subject, recipe, classes)
    if images is None:
        return f"teacher alignment: the training set has no image of the classes {classes}"
    width, hidden = state["0.weight"].shape[1], state["0.weight"].shape[0]
    projector = Projector(width, hidden, len(state["4.bias"]))
    load_strict(projector, state, str(subject.checkpoint))
    block = recipe.objective.alignment.block_of(subject.model.config.depth)
    cosine_BSN = cosines(subject, projector.to(subject.device).eval(), images, block)
    return [_draw(subject, recipe, images, cosine_BSN, block, directory)]


def _missing_data(recipe: PretrainConfig) -> str | None:
    data = recipe.data
    for name in ("tokens", "features", "images"):
        path = getattr(data, name)
        if path is not None and not (path / INDEX_NAME).exists():
            return f"data.{name} of the run, {path}, is not there any more"
    if data.features is None and data.teacher is None:
        return "the recipe names neither data.features nor data.teacher"
    return None


@torch.no_grad()
def guided_images(subject: Subject, recipe: PretrainConfig, classes: list[int]) -> GuidedImages | None:
    """The first training image of each class; None if there is none of them."""
    data = recipe.data
    path = data.tokens or data.images
    assert path is not None
    shards = ShardSet(path, "data")
    labels_N = shards.read_labels(np.arange(len(shards)))
    numbers = [int(np.flatnonzero(labels_N == label)[0]) for label in classes if label in labels_N]
    if not numbers:
        return None
    labels_B = torch.from_numpy(labels_N[numbers]).to(subject.device)
    if data.tokens is not None:
        batch = read_samples(data.tokens, data.features, numbers).to(subject.device)
        assert batch.features_BNC is not None
        return GuidedImages(labels_B, batch.tokens_BL, batch.features_BNC)
    assert data.teacher is not None
    teacher = build_teacher(data.teacher.name, data.teacher.weights).to(subject.device)
    images_B3HW = torch.stack([_image(shards, number, subject.tokenizer.config.image_side) for number in numbers])
    images_B3HW = images_B3HW.to(subject.device)
    return GuidedImages(labels_B, subject.tokenizer.encode(images_B3HW), teacher.patch_features(images_B3HW))


def _image(shards: ShardSet, number: int, side: int) -> Tensor:
    """(3, H, W) in [-1, 1], cropped at the centre."""
    key, members = shards.read(number)
    pixels_HW3 = np.array(fit_image(decode_sample(shards, key, members), side))
    return torch.from_numpy(pixels_HW3).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def cosines(subject: Subject, projector: Projector, images: GuidedImages, block: int) -> NDArray[np.float32]:
    """(B, S, N): the cosine over channels of the teacher's features and the aggregate up to each scale."""
    inputs_BLZ = subject.tokenizer.inputs_from_tokens(images.tokens_BL)
    hidden_BLC = subject.model(images.labels_B, inputs_BLZ, hidden_after=block).hidden_BLC
    assert hidden_BLC is not None
    schedule = subject.model.schedule
    scales = range(1, schedule.num_scales + 1)
    maps = cosine_maps(projector(hidden_BLC), images.features_BNP, schedule, scales)
    return torch.stack(list(maps), dim=1).cpu().numpy()


def _draw(
    subject: Subject,
    recipe: PretrainConfig,
    images: GuidedImages,
    cosine_BSN: NDArray[np.float32],
    block: int,
    directory: Path,
) -> Picture:
    assert recipe.objective.alignment is not None
    aligned, schedule = recipe.objective.alignment.scales, subject.model.schedule
    pixels_BHW3 = signed_to_uint8(subject.tokenizer.decode(images.tokens_BL))
    labels = images.labels_B.tolist()
    columns = ["image"]
    for scale, mean in enumerate(cosine_BSN.mean((0, 2)), start=1):
        mark = "aligned " if scale in aligned else ""
        columns.append(f"{mark}{schedule.sides[scale - 1]} x {schedule.sides[scale - 1]}\nmean {mean:.2f}")
    tiles: list[list[Pixels]] = [
        [resized(pixels_HW3, _SIDE), *(resized(heat(cosine_N), _SIDE, smooth=False) for cosine_N in cosine_SN)]
        for pixels_HW3, cosine_SN in zip(pixels_BHW3, cosine_BSN, strict=True)
    ]
    path = directory / "alignment.png"
    sheet = draw_sheet(
        tiles,
        title=f"Cosine of projected hidden states (after block {block}, summed up to each scale) and teacher; "
        f"training images{subject.which(labels)}",
        columns=columns,
        rows=[subject.caption(label) for label in labels],
        legend=[(f"{value:+.1f}", _colour(value)) for value in (-1.0, -0.5, 0.0, 0.5, 1.0)],
    )
    save_png(sheet.pixels_HW3, path)
    data = path.with_suffix(".npz")
    save_arrays(data, cosine_BSN=cosine_BSN, labels_B=labels, sides_S=schedule.sides, aligned_scales=aligned)
    shows = (
        "cosine over channels at each patch of the teacher's grid, for the aggregate up to each scale; the loss "
        f"aligns the scales {list(aligned)} (1-based)"
    )
    return Picture(path, shows, data)


def heat(cosine_N: NDArray[np.float32]) -> Pixels:
    """(G, G, 3) colours of -1 to 1."""
    side = round(len(cosine_N) ** 0.5)
    colours = matplotlib.colormaps[_MAP]((cosine_N.reshape(side, side) + 1) / 2)
    return (colours[..., :3] * 255).round().astype(np.uint8)


def _colour(value: float) -> Colour:
    red, green, blue = (int(part) for part in heat(np.array([value], np.float32))[0, 0])
    return red, green, blue
