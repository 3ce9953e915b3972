"""How an image comes about: what is decoded of the token maps up to each scale, as a strip and as a moving picture.

Shapes: S scales, B images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from mepa_ds.files import atomic_path
from mepa_ds.images.pictures import save_png, signed_to_uint8
from mepa_ds.images.sheets import Pixels, draw_sheet
from mepa_ds.inspection.subject import Drawn, Picture, Subject
from mepa_ds.inspection.tracing import Sampling, draw
from mepa_ds.scales import ScaleSchedule

_FRAME_MS, _LAST_MS = 500, 2000


def draw_scales(
    subject: Subject, classes: list[int], sampling: Sampling, directory: Path, on_images: Callable[[int], object]
) -> Drawn:
    """Writes scales.png, scales.gif and scales.npz: one sample of each class after each scale."""
    parts = []
    for start in range(0, len(classes), sampling.batch_size):
        part = classes[start : start + sampling.batch_size]
        parts.append(sampled_scales(subject, part, sampling, start))
        on_images(len(part))
    pixels_SBHW3 = np.concatenate(parts, axis=1)
    path, moving, data = (directory / f"scales.{suffix}" for suffix in ("png", "gif", "npz"))
    captions = [subject.caption(label) for label in classes]
    title = f"What is decoded after each scale. Samples, {sampling}{subject.which(classes)}"
    columns = [f"{side} x {side}" for side in subject.model.schedule.sides]
    save_png(draw_sheet(pixels_SBHW3.swapaxes(0, 1), title=title, columns=columns, rows=captions).pixels_HW3, path)
    save_moving(pixels_SBHW3, captions, subject.model.schedule, moving)
    save_arrays(data, pixels_SBHW3=pixels_SBHW3, labels_B=np.array(classes), sides_S=subject.model.schedule.sides)
    shows = "one sample a row: the image decoded from all token maps up to each scale"
    return [Picture(path, shows, data), Picture(moving, f"the same as a moving picture, {len(columns)} frames", data)]


def sampled_scales(subject: Subject, labels: list[int], sampling: Sampling, first_index: int = 0) -> NDArray[np.uint8]:
    """(S, B, H, W, 3): each image as decoded after each scale; the last is the sample itself."""
    steps: list[NDArray[np.uint8]] = []

    def keep(scale: int, f_hat: Tensor) -> None:
        steps.append(signed_to_uint8(subject.tokenizer.decode_f_hat(f_hat)))

    with torch.no_grad():
        draw(subject, labels, sampling, first_index, keep)
    return np.stack(steps)


def save_moving(pixels_SBHW3: NDArray[np.uint8], captions: list[str], schedule: ScaleSchedule, path: Path) -> None:
    """Writes a GIF with one frame for each scale, all images side by side; the last frame stays longer."""
    frames: list[Pixels] = [
        draw_sheet([list(pixels_BHW3)], title=f"scale {scale + 1} of {schedule.num_scales}: {side} x {side}",
                   columns=captions).pixels_HW3
        for scale, (pixels_BHW3, side) in enumerate(zip(pixels_SBHW3, schedule.sides, strict=True))
    ]  # fmt: skip
    first, *others = (Image.fromarray(frame) for frame in frames)
    durations = [_FRAME_MS] * len(others) + [_LAST_MS]
    with atomic_path(path) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)


def save_arrays(path: Path, **arrays: ArrayLike) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})
