"""Trains the small convolutional teachers (conv_net.py) on images that are held in memory.

Shape legend: N images, B batch, H image height, W image width, C teacher width, D width of the contrastive head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mepa_ds.errors import UserError
from mepa_ds.progress import Progress
from mepa_ds.random_streams import generator
from mepa_ds.teachers.conv_net import ConvNetConfig, ConvTeacher, Kind, nt_xent

_HEAD_WIDTH = 128
_WEIGHT_DECAY = 0.05


def fit_conv_teacher(
    kind: Kind, images_N3HW: Tensor, labels_N: Tensor | None, config: ConvNetConfig, device: torch.device
) -> ConvTeacher:
    """A trained teacher, on the CPU. The same images, config and number of threads give the same weights on a CPU.

    Args:
        images_N3HW: uint8, of the teacher's input side (grid_side x pixels_per_cell).
        labels_N: the classes, for `supervised`.

    Raises:
        UserError: fewer images than a batch, or `supervised` without labels or with one class.
    """
    if len(images_N3HW) < config.batch:
        raise UserError(
            f"fit-teacher {kind}: {len(images_N3HW)} images, but a batch has {config.batch}; give more images"
        )
    if kind == "supervised" and (labels_N is None or len(labels_N.unique()) < 2):
        raise UserError(
            "fit-teacher supervised: the images have no labels of at least two classes to learn from; use "
            "`fit-teacher contrastive`, which needs none"
        )
    teacher = ConvTeacher(kind, config).to(device)
    num_outputs = int(labels_N.max()) + 1 if kind == "supervised" and labels_N is not None else _HEAD_WIDTH
    head = _head(kind, config.width, num_outputs).to(device)
    networks = nn.ModuleDict({"net": teacher.net, "head": head})
    _draw_weights(networks, config.seed)
    networks.train()
    optimizer = torch.optim.AdamW(networks.parameters(), lr=config.lr, weight_decay=_WEIGHT_DECAY)
    augmenting = generator(config.seed, "teacher", "augmentation")
    progress = Progress(_batches(len(images_N3HW), config), f"fit {kind}", config.steps, unit="step")
    for step, rows_B in enumerate(progress):
        optimizer.param_groups[0]["lr"] = config.lr * _rate(step, config.steps)
        pixels_B3HW = images_N3HW[rows_B].to(device).float().mul_(2 / 255).sub_(1)
        if kind == "supervised":
            assert labels_N is not None
            pooled_BC = teacher.net(augmented(pixels_B3HW, augmenting, least_area=0.6)).mean((2, 3))
            loss = F.cross_entropy(head(pooled_BC), labels_N[rows_B].to(device))
        else:
            views = [augmented(pixels_B3HW, augmenting, least_area=0.3) for _ in range(2)]
            pooled_NC = teacher.net(torch.cat(views)).mean((2, 3))
            loss = nt_xent(head(pooled_NC).unflatten(0, (2, -1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == config.steps - 1:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return teacher.cpu().freeze()


def augmented(images_B3HW: Tensor, draws: torch.Generator, least_area: float) -> Tensor:
    """Each image's own random crop of `least_area` to all of its area, resized to its side; flipped or not; its
    brightness and contrast moved by up to 0.4."""
    size = len(images_B3HW)
    uniform_5B = torch.rand(5, size, generator=draws)
    side_B = (least_area + (1 - least_area) * uniform_5B[0]).sqrt()
    flip_B = torch.where(torch.rand(size, generator=draws) < 0.5, -1.0, 1.0)
    theta_B23 = torch.zeros(size, 2, 3)
    theta_B23[:, 0, 0], theta_B23[:, 1, 1] = side_B * flip_B, side_B
    theta_B23[:, 0, 2] = (1 - side_B) * (2 * uniform_5B[1] - 1)
    theta_B23[:, 1, 2] = (1 - side_B) * (2 * uniform_5B[2] - 1)
    where_BHW2 = F.affine_grid(theta_B23.to(images_B3HW.device), list(images_B3HW.shape), align_corners=False)
    cropped = F.grid_sample(images_B3HW, where_BHW2, padding_mode="reflection", align_corners=False)
    contrast_B111, brightness_B111 = (
        (0.8 * (u_B - 0.5)).to(images_B3HW.device).view(-1, 1, 1, 1) for u_B in uniform_5B[3:]
    )
    return (cropped * (1 + contrast_B111) + brightness_B111).clamp(-1, 1)


def _head(kind: Kind, width: int, num_outputs: int) -> nn.Module:
    if kind == "supervised":
        return nn.Linear(width, num_outputs)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_outputs))


@torch.no_grad()
def _draw_weights(networks: nn.Module, seed: int) -> None:
    """He's normal for convolutions and matrices, zero for biases, from streams of their own."""
    for name, parameter in networks.named_parameters():
        if parameter.ndim > 1:
            std = math.sqrt(2 / parameter[0].numel())
            parameter.copy_(torch.randn(parameter.shape, generator=generator(seed, "teacher", name)) * std)
        elif name.endswith("bias"):
            parameter.zero_()


def _batches(num_images: int, config: ConvNetConfig) -> Iterator[Tensor]:
    """Rows of `config.steps` whole batches: every epoch an order of its own."""
    order = generator(config.seed, "teacher", "order")
    left = config.steps
    while left:
        epoch = torch.randperm(num_images, generator=order).split(config.batch)
        whole = [rows_B for rows_B in epoch if len(rows_B) == config.batch][:left]
        left -= len(whole)
        yield from whole


def _rate(step: int, num_steps: int) -> float:
    """The share of the peak: a warm-up over the first twentieth, then a cosine to 0."""
    warmup = max(num_steps // 20, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(num_steps - warmup, 1)))
