"""Where the hidden states agree with the teacher: the cosine at each patch, for the aggregate up to each scale.

Shapes: B images, N = G x G patches, P teacher width, S scales, L positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mepa_ds.checkpoint.weights import read_projector
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.images import images_once
from mepa_ds.data.shards.index import INDEX_NAME
from mepa_ds.data.training import evaluation_batches
from mepa_ds.images.decoding import Colour
from mepa_ds.images.pictures import save_png, to_uint8
from mepa_ds.images.sheets import Pixels, draw_sheet, resized
from mepa_ds.inspection.scales import save_arrays
from mepa_ds.inspection.subject import Drawn, Picture, Subject
from mepa_ds.objective.alignment import NORM_EPS, Projector, aggregates
from mepa_ds.scales import ScaleSchedule
from mepa_ds.teachers.registry import build_teacher
from mepa_ds.weights.directories import load_strict

_SIDE = 80
_MAP = "viridis"


class GuidedImages(NamedTuple):
    """Training images with the teacher's features."""

    labels_B: Tensor
    tokens_BL: Tensor
    features_BNP: Tensor


def draw_guidance(subject: Subject, classes: list[int], batch_size: int, directory: Path) -> Drawn:
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
    images = guided_images(subject, recipe, classes, batch_size)
    if images is None:
        return f"teacher alignment: no image of the classes {classes} is among the first of the training set"
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
def guided_images(subject: Subject, recipe: PretrainConfig, classes: list[int], batch_size: int) -> GuidedImages | None:
    """The first training image of each class, as far as the first images of the set have them."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for number, (labels_B, tokens_BL, features_BNP) in enumerate(_batches(subject, recipe, batch_size)):
        for row, label in enumerate(labels_B.tolist()):
            if label in classes and label not in found:
                found[label] = (tokens_BL[row], features_BNP[row].float())
        if len(found) == len(set(classes)) or (number + 1) * batch_size >= 2000:
            break
    if not found:
        return None
    labels = [label for label in classes if label in found]
    tokens, features = zip(*(found[label] for label in labels), strict=True)
    device = subject.device
    return GuidedImages(torch.tensor(labels, device=device), torch.stack(tokens), torch.stack(features))


def _batches(subject, recipe: PretrainConfig, batch_size: int):  # type: ignore[no-untyped-def]
    data = recipe.data
    if data.tokens is not None:
        for batch in evaluation_batches(data.tokens, data.features, batch_size=batch_size):
            moved = batch.to(subject.device)
            yield moved.labels_B, moved.tokens_BL, moved.features_BNC
        return
    assert data.images is not None
    assert data.teacher is not None
    teacher = build_teacher(data.teacher.name, data.teacher.weights).to(subject.device)
    side = subject.tokenizer.config.image_side
    for images in images_once(data.images, batch_size=batch_size, image_side=side):
        images_B3HW = images.to(subject.device).images_B3HW
        yield images.labels_B, subject.tokenizer.encode(images_B3HW), teacher.patch_features(images_B3HW)


@torch.no_grad()
def cosines(subject: Subject, projector: Projector, images: GuidedImages, block: int) -> NDArray[np.float32]:
    """(B, S, N): the cosine over channels of the teacher's features and the aggregate up to each scale."""
    inputs_BLZ = subject.tokenizer.inputs_from_tokens(images.tokens_BL)
    hidden_BLC = subject.model(images.labels_B, inputs_BLZ, hidden_after=block).hidden_BLC
    assert hidden_BLC is not None
    return cosine_maps(projector(hidden_BLC), images.features_BNP, subject.model.schedule).cpu().numpy()


def cosine_maps(z_BLP: Tensor, features_BNP: Tensor, schedule: ScaleSchedule) -> Tensor:
    """(B, S, N) from the projected hidden states of all positions, as the loss has it for the scales that it aligns."""
    teacher_BNP = F.normalize(features_BNP.float(), dim=-1)
    grid_side = round(features_BNP.shape[1] ** 0.5)
    scales = range(1, schedule.num_scales + 1)
    return torch.stack(
        [
            (z_BNP * teacher_BNP).sum(-1) / torch.linalg.vector_norm(z_BNP, dim=-1).clamp_min(NORM_EPS)
            for z_BNP in aggregates(z_BLP, schedule, grid_side, list(scales))
        ],
        dim=1,
    )


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
    pixels_BHW3 = to_uint8(subject.tokenizer.decode(images.tokens_BL).add(1).div(2))
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
        "training images",
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
