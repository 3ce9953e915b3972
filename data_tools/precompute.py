"""Makes token and feature sets from an image set: `mepa data precompute tokens|features|fit-teacher --help`.

Runs on one process, under torchrun (the shards are split over the ranks) or as a job array (--num-parts, --part); a
run that was killed continues with the missing shards, and a rerun ends the same to the byte.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes long to import
    from mepa_ds.interrupts import raise_interrupts

    raise_interrupts()

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from mepa_ds import distributed, log
from mepa_ds.command_line import entry
from mepa_ds.command_line.paths import PathOrName
from mepa_ds.command_line.scales import Scales
from mepa_ds.data.codecs import codec_named, pca_components
from mepa_ds.data.shard_set import LABEL_EXTENSION, ShardSet, spread
from mepa_ds.data.shards.index import Kind, MadeBy, ShardIndex, images_identity
from mepa_ds.data.shards.writer import Manifest, ShardWriter, npy_bytes
from mepa_ds.data.training_sets import TOKENS_EXT
from mepa_ds.data.views import BOX_EXT, CENTRE, WHOLE, Boxes, Views, whole_grid
from mepa_ds.data_tools.fit_teacher import FitTeacher
from mepa_ds.data_tools.precompute_basis import shared_basis
from mepa_ds.data_tools.precompute_sets import (
    Derivation,
    Item,
    Pixels,
    RunOptions,
    batches_of,
    derive_set,
    open_images,
    stored_square,
    to_device,
)
from mepa_ds.errors import UserError
from mepa_ds.images.resizing import RESIZE_RATIO
from mepa_ds.teachers.registry import build_teacher
from mepa_ds.tokenizer.tokenizer import Tokenizer

CLS_TOKEN_EXT = "cls_token.npy"
_BASIS_IMAGES = 1024

Run = Annotated[RunOptions, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Tokens:
    """Token maps of every image, by a frozen tokenizer."""

    images: tyro.conf.Positional[Path]
    """Directory of the image set."""
    tokenizer: Path
    """Directory of a trained tokenizer, or VAR's vae_ch160v4096z32.pth."""
    scales: Scales = None
    """Sides of the token maps, if they are not the tokenizer's own (512 px: 1 2 3 4 6 9 13 18 24 32)."""
    views: str = CENTRE
    """`centre`, or `random:K` for K random crops out of a resize to 1.125x (VAR), whose boxes are stored."""
    views_seed: int = 0
    """Seed of the random crops; give the features the same seed."""
    out: Path | None = None
    """Directory of the new set [default: IMAGES.tokens-TOKENIZER, beside the images]."""
    run: Run = field(default_factory=RunOptions)

    def __call__(self) -> None:
        self.prepared()()

    def prepared(self) -> Callable[[], None]:
        """Opens everything and checks it against what `out` already holds. The returned function does the work."""
        device = _device(self.run)
        images = open_images(self.images)
        tokenizer = _load_tokenizer(self.tokenizer, self.scales).to(device)
        config = tokenizer.config
        views = Views.parse(self.views, config.image_side, self.views_seed)
        settings = {"scales": list(config.scales), "codebook_size": config.codebook_size, **views.settings}
        made_by = _made_by(images, _name_of(self.tokenizer), tokenizer.identity, settings)
        dtype = torch.uint16 if config.codebook_size <= 2**16 else torch.int32

        def encode(images_B3HW: Tensor) -> dict[str, Tensor]:
            return {TOKENS_EXT: tokenizer.encode(images_B3HW).cpu().to(dtype)}

        def extras(item: Item) -> dict[str, bytes]:
            members = {LABEL_EXTENSION: item.members[LABEL_EXTENSION]} if LABEL_EXTENSION in item.members else {}
            return members if item.boxes is None else {**members, BOX_EXT: npy_bytes(item.boxes)}

        writer = _writer(images, self.out, "tokens", made_by)
        derivation = Derivation(views.crop, encode, extras, views.count)
        return partial(_derive, images, writer, derivation, device, self.run)


@dataclass(frozen=True)
class Features:
    """Patch features of every image, by a frozen teacher."""

    images: tyro.conf.Positional[Path]
    """Directory of the image set."""
    teacher: str
    """patch-pca, contrastive, supervised (fit-teacher makes these), dinov2-s|b|l|g[-reg],
    dinov3-s|s-plus|b|l|h-plus|7b, dinov3-l|7b-sat (trained on satellite images), or any plain ViT by its name in
    timm."""
    weights: PathOrName | None = None
    """Local checkpoint of the teacher (a file or directory of timm, the authors or the transformers library, or the
    directory that fit-teacher wrote), or `hub` to let timm download it."""
    codec: str = "int8"
    """How features are stored: fp16, int8 (a scale a token) or pca<k>-int8 (k principal components)."""
    grid_side: int | None = None
    """Features along one side of a view [default: the teacher's own, 16 for ViTs]."""
    views: str = CENTRE
    """`centre`; `random:K`, the crops of the token set; or `whole`: one map of the whole image, read at their boxes."""
    views_seed: int = 0
    """Seed of the random crops: the one that was given to the tokens."""
    image_side: int | None = None
    """Side of the square cut from each image, in pixels [default, for centre: that of the stored squares]."""
    cls: bool = False
    """Also store the CLS token (fp16)."""
    out: Path | None = None
    """Directory of the new set [default: IMAGES.features-TEACHER, beside the images]."""
    run: Run = field(default_factory=RunOptions)

    def __call__(self) -> None:
        self.prepared()()

    def prepared(self) -> Callable[[], None]:
        """As `Tokens.prepared`. A PCA basis is fitted by the function that it returns."""
        components = pca_components(self.codec)
        device = _device(self.run)
        images = open_images(self.images)
        _allow_tf32(device)
        teacher = build_teacher(self.teacher, self.weights, self.grid_side).to(device)
        if self.cls and not teacher.has_cls:
            raise UserError(f"--cls: the teacher {teacher.name} has no CLS token")
        views = None if self.views == WHOLE else self._views(images)
        view_settings = {"views": WHOLE, "resize_ratio": RESIZE_RATIO} if views is None else views.settings
        own = {"codec": self.codec, "width": teacher.width, "grid_side": teacher.grid_side, "cls": self.cls}
        made_by = _made_by(images, teacher.name, teacher.identity, {**own, **view_settings})
        writer = _writer(images, self.out, "features", made_by)
        prepare = _whole_image if views is None else views.crop

        def features(images_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
            if views is not None:
                return teacher.features(images_B3HW)
            rows, columns = whole_grid(images_B3HW.shape[-2], images_B3HW.shape[-1], teacher.grid_side)
            patches_BNC, cls_BC = teacher.features(images_B3HW, (rows, columns))
            return patches_BNC.unflatten(1, (rows, columns)), cls_BC

        def run() -> None:
            basis = None
            if components is not None:
                samples = spread(len(images), _BASIS_IMAGES)
                blocks = batches_of(images, samples, prepare, 1, self.run.workers)
                patches = (features(to_device(block, device))[0] for block in blocks)
                basis = shared_basis(writer, components, teacher, patches, len(samples)).to(device)
            codec = codec_named(self.codec, basis)

            def encode(images_B3HW: Tensor) -> dict[str, Tensor]:
                patches, cls_BC = features(images_B3HW)
                stored = codec.encode(patches)
                return {**stored, CLS_TOKEN_EXT: cls_BC.half()} if self.cls and cls_BC is not None else stored

            derivation = Derivation(prepare, encode, lambda _: {}, 0 if views is None else views.count)
            _derive(images, writer, derivation, device, self.run)

        return run

    def _views(self, images: ShardSet) -> Views:
        side = self.image_side
        if side is None:
            if self.views != CENTRE:
                raise UserError("--image-side: give the tokenizer's image side, so that the crops are the tokens' own")
            side = stored_square(images)
        return Views.parse(self.views, side, self.views_seed)


def _device(options: RunOptions) -> torch.device:
    options.check()
    device = distributed.choose_device(distributed.read_launch())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _allow_tf32(device: torch.device) -> None:
    """Only for teachers: TF32 is as fine as fp16 and finer than int8, but it may change a token into another."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def _load_tokenizer(path: Path, scales: tuple[int, ...] | None) -> Tokenizer:
    if not path.exists():
        raise UserError(f"--tokenizer: {path}: no such file or directory")
    return Tokenizer.open(path, scales)


def _name_of(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem


def _made_by(images: ShardSet, name: str, identity: str, settings: dict[str, Any]) -> MadeBy:
    return MadeBy(name=name, identity=identity, settings={**settings, "images": images_identity(images.index)})


def _writer(images: ShardSet, out: Path | None, kind: Kind, made_by: MadeBy) -> ShardWriter:
    out = out or default_directory(images.directory, kind, made_by.name)
    names = tuple(shard.name for shard in images.index.shards)
    return ShardWriter(out, Manifest(kind=kind, shard_names=names, classes=images.index.classes, made_by=made_by))


def default_directory(images: Path, kind: str, name: str) -> Path:
    """The directory of the set that a tokenizer or teacher of that name makes, unless --out says otherwise."""
    images = images.resolve()
    return images.with_name(f"{images.name}.{kind}-{name}")


def _derive(
    images: ShardSet, writer: ShardWriter, derivation: Derivation, device: torch.device, options: RunOptions
) -> None:
    start = time.monotonic()
    index = derive_set(images, writer, derivation, device, options)
    if index is None:
        log.say(f"{writer.directory}: this part is done; {len(writer.missing())} shards are missing", flush=True)
        return
    _report(writer.directory, index, time.monotonic() - start)


def _report(directory: Path, index: ShardIndex, seconds: float) -> None:
    size = sum(shard.bytes for shard in index.shards)
    log.say(
        f"{directory}: {index.num_samples} samples in {len(index.shards)} shards, {size / 1e6:.1f} MB, made by "
        f"{index.made_by.name} ({index.made_by.identity}) in {seconds:.1f} s",
        flush=True,
    )


def _whole_image(image: Image.Image, key: str) -> tuple[Pixels, Boxes | None]:
    return np.asarray(image)[None], None


def parse(argv: Sequence[str] | None = None, prog: str = "precompute.py") -> Tokens | Features | FitTeacher:
    """Parses the words of a command line (None: the process's own). Wrong words end the process with a message."""
    commands = (
        Annotated[Tokens, tyro.conf.subcommand("tokens")]
        | Annotated[Features, tyro.conf.subcommand("features")]
        | Annotated[FitTeacher, tyro.conf.subcommand("fit-teacher")]
    )
    return tyro.cli(commands, prog=prog, args=argv, description=__doc__)  # type: ignore[call-overload, no-any-return]


def main(argv: Sequence[str] | None = None, prog: str = "precompute.py") -> None:
    command = parse(argv, prog)
    log.make_stdout_a_log()
    try:
        command()
    except UserError as error:
        if not (launch := distributed.read_launch()).is_main:  # each rank has its own shards, and so its own error
            log.note(f"error: rank {launch.rank}: {error}")
        raise


if __name__ == "__main__":
    entry.run(main)
