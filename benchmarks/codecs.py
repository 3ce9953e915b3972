"""What each feature codec costs and keeps, and how near a whole-image map comes to per-view features.

    python benchmarks/codecs.py --json FILE                                   # what every machine can measure
    python benchmarks/codecs.py --images SHARDS --teacher dinov2-b --weights FILE --json FILE   # a real teacher

Without a teacher it takes the photos and digits that ship with scikit-learn and three stand-ins: DINOv2-B's
architecture with random weights, and patch PCAs fitted on the photos and on the digits.

Shape legend: B images, K views, N patches, C teacher width, h and w rows and columns of a whole-image map.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mepa_ds.command_line import entry
from mepa_ds.data.codecs import FeatureDecoder, PcaBasis, codec_named
from mepa_ds.data.shards.tar_headers import BLOCK
from mepa_ds.data.shards.writer import npy_bytes
from mepa_ds.data.views import Views, sample_boxes, whole_grid
from mepa_ds.data_tools.precompute_sets import batches_of, open_images
from mepa_ds.errors import UserError
from mepa_ds.files import write_json
from mepa_ds.images.resizing import RESIZE_RATIO
from mepa_ds.teachers.base import Teacher
from mepa_ds.teachers.patch_pca import PatchPca, PatchPcaConfig
from mepa_ds.teachers.pca import RunningCovariance
from mepa_ds.teachers.registry import build_teacher
from mepa_ds.teachers.timm_vit import TimmVit


@dataclass(frozen=True)
class Options:
    """Measure the feature codecs and the whole-image views."""

    json: Path | None = None
    """Write the numbers here."""
    images: Path | None = None
    """Image set to measure on, with --teacher [default: what ships with scikit-learn]."""
    teacher: str | None = None
    """Teacher to measure, with its --weights."""
    weights: str | None = None
    """As in data_tools/precompute.py."""
    image_side: int = 256
    """Side of a view."""
    samples: int = 32
    """Images measured; the PCA bases are fitted on as many others."""
    views: int = 4
    """Random crops of each image."""
    seed: int = 0
    """Of random weights, places in the photos, crops."""


@dataclass(frozen=True)
class Source:
    """Square images of 1.125 S pixels and a teacher that looks at S x S crops of them."""

    name: str
    images: list[Image.Image]
    teacher: Teacher
    side: int


def photo_squares(side: int, count: int, seed: int) -> list[Image.Image]:
    """Squares at random places of the two photos that ship with scikit-learn (427 x 640 pixels each)."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    photos, squares = load_sample_images().images, []
    for number in range(count):
        photo = photos[number % 2]
        top, left = rng.integers(photo.shape[0] - side + 1), rng.integers(photo.shape[1] - side + 1)
        squares.append(Image.fromarray(photo[top : top + side, left : left + side]))
    return squares


def digit_squares(side: int, count: int) -> list[Image.Image]:
    from sklearn.datasets import load_digits

    levels = (load_digits().images[:count] * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(image).convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for image in levels]


def builtin_sources(options: Options) -> list[Source]:
    import timm

    torch.manual_seed(options.seed)
    side, count = options.image_side, 2 * options.samples
    photos = photo_squares(round(RESIZE_RATIO * side), count, options.seed)
    # A layer scale of 1: with DINOv2's initial 1e-5 the blocks of an untrained model would be no more than identity.
    model = timm.create_model("vit_base_patch14_dinov2", num_classes=0, dynamic_img_size=True, init_values=1.0)
    vit = TimmVit("dinov2-b, random weights", model, 16).freeze()
    photo_pca = PatchPca.fit(_batches(photos), PatchPcaConfig(width=64))
    digits = digit_squares(36, max(count, 500))
    digit_pca = PatchPca.fit(_batches(digits), PatchPcaConfig(grid_side=4, width=64))
    return [
        Source("dinov2-b architecture, random weights, photos", photos, vit, side),
        Source("patch-pca, photos", photos, photo_pca, side),
        Source("patch-pca, digits", digits, digit_pca, 32),
    ]


def given_source(options: Options) -> Source:
    if options.images is None or options.teacher is None:
        raise UserError("--images and --teacher go together")
    shards = open_images(options.images)
    teacher = build_teacher(options.teacher, options.weights)
    whole = Views(round(RESIZE_RATIO * options.image_side))
    numbers = np.unique(np.linspace(0, len(shards) - 1, 2 * options.samples).astype(int)).tolist()
    batches = batches_of(shards, numbers, whole.crop, 1, 2)
    images = [Image.fromarray(batch[0].pixels_KHW3[0]) for batch in batches]
    return Source(f"{options.teacher}, {options.images.name}", images, teacher, options.image_side)


def _batches(images: list[Image.Image], size: int = 8) -> list[Tensor]:
    return [
        _tensor(np.stack([np.asarray(image) for image in images[start : start + size]]))
        for start in range(0, len(images), size)
    ]


def _tensor(pixels_BHW3: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2).float() / 127.5 - 1


def measure(source: Source, options: Options) -> dict[str, Any]:
    """Cosines, bytes and rates of one source."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = source.teacher.to(device)
    views = Views(source.side, options.views, options.seed)
    grid = whole_grid(*source.images[0].size[::-1], teacher.grid_side)
    per_view, from_whole, fitting = [], [], RunningCovariance(teacher.width)
    for number, image in enumerate(tqdm(source.images[: 2 * options.samples], source.name)):
        crops, boxes = views.crop(image, str(number))
        assert boxes is not None
        features_KNC = teacher.patch_features(_tensor(crops).to(device))
        if number >= options.samples:  # these only fit the PCA bases
            fitting.add(features_KNC.flatten(0, 1))
            continue
        per_view.append(features_KNC.cpu())
        map_hwC = teacher.patch_features(_tensor(np.array(image)[None]).to(device), grid)[0].unflatten(0, grid)
        boxes_K4 = torch.from_numpy(boxes).to(device)
        from_whole.append(sample_boxes(map_hwC.expand(len(boxes), -1, -1, -1), boxes_K4, teacher.grid_side).cpu())
    features = torch.stack(per_view)
    whole = F.cosine_similarity(torch.stack(from_whole), features, dim=-1)
    other = F.cosine_similarity(features.roll(1, dims=1), features, dim=-1)  # the next view, in the same place
    codecs = {}
    for name in ("fp16", "int8", *(f"pca{teacher.width // part}-int8" for part in (2, 3, 6))):
        codecs[name] = measure_codec(name, features.flatten(0, 1), fitting)
    return {
        "teacher_width": teacher.width,
        "patches": teacher.grid_side**2,
        "tokens_measured": features[..., 0].numel(),
        "codecs": codecs,
        "whole_map": {**_cosines(whole), "grid": list(grid), "another_view_mean": float(other.mean())},
    }


def measure_codec(name: str, features_BNC: Tensor, fitting: RunningCovariance) -> dict[str, Any]:
    basis = None
    if name.startswith("pca"):
        components = int(name[3:].split("-")[0])
        basis = PcaBasis(*fitting.principal_components(components)[:2], teacher="")
    codec = codec_named(name, basis)
    stored = codec.encode(features_BNC)
    decoded = FeatureDecoder(codec)(*(stored[ext] for ext in codec.extensions))
    members = [len(npy_bytes(stored[ext][0].numpy())) for ext in codec.extensions]
    cosine = F.cosine_similarity(decoded.double(), features_BNC.double(), dim=-1)
    return {
        **_cosines(cosine),
        "mean_cosine_error": float((1 - cosine).mean()),
        "bytes_a_sample": sum(stored[ext][0].nbytes for ext in codec.extensions),
        "bytes_a_sample_in_a_tar": sum(BLOCK + -(-size // BLOCK) * BLOCK for size in members),
    }


def _cosines(cosine: Tensor) -> dict[str, float]:
    return {"mean_cosine": float(cosine.double().mean()), "p01_cosine": float(cosine.flatten().quantile(0.01))}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    given = options.images is not None or options.teacher is not None
    sources = [given_source(options)] if given else builtin_sources(options)
    results = {source.name: measure(source, options) for source in sources}
    for name, result in results.items():
        print(f"\n{name}: {result['patches']} x {result['teacher_width']}, {result['tokens_measured']} tokens")
        print("| codec | mean cosine error | 1st percentile of cosine | bytes a sample | in a tar |")
        print("|---|---|---|---|---|")
        for codec, row in result["codecs"].items():
            print(
                f"| {codec} | {row['mean_cosine_error']:.1e} | {row['p01_cosine']:.5f} | {row['bytes_a_sample']:,} | "
                f"{row['bytes_a_sample_in_a_tar']:,} |"
            )
        whole = result["whole_map"]
        print(
            f"whole-image map {whole['grid']} against per-view features: mean cosine {whole['mean_cosine']:.4f}, "
            f"1st percentile {whole['p01_cosine']:.4f} (another view in its place: {whole['another_view_mean']:.4f})"
        )
    if options.json is not None:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
        write_json(options.json, {"machine": machine, "results": results})


if __name__ == "__main__":
    entry.run(main)
