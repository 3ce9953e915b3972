"""`mepa sample`: images of chosen classes as one PNG grid, or one PNG each."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from mepa_ds import distributed, log
from mepa_ds.command_line import entry
from mepa_ds.command_line.scales import Scales
from mepa_ds.errors import UserError
from mepa_ds.files import check_writable, naming_full_disks
from mepa_ds.progress import Progress

_DECIDES = ("per_class", "cfg", "top_k", "top_p", "seed", "smooth", "rng", "precision")
_TOLD = ("num_heads", "depth", "phi_ratio")  # what foreign weights do not tell


@dataclass
class SampleOptions:
    """Generates images class by class: one row a class in the grid, with its name where the run's data have one."""

    weights: Path
    """Directory of safetensors + config.json (<output_dir>/best of a run), or VAR's var_d16.pth."""
    tokenizer: Path
    """The model's tokenizer: its directory, or VAR's vae_ch160v4096z32.pth."""
    out: Path
    """PNG file of the grid. A directory gets one PNG for each image instead; a killed command continues there."""
    scales: Scales = None
    """Sides of the token maps, such as 1 2 3 4, if VAR weights do not tell them and they are not VAR's own."""
    num_heads: int | None = None
    """Number of attention heads, if VAR weights do not tell it (those without QK normalisation)."""
    depth: int | None = None
    """Number of blocks, if VAR weights do not tell it and it is not width / 64."""
    phi_ratio: float | None = None
    """Share of phi's convolution, if a tokenizer of VAR's architecture does not tell it and it is not 0.5."""
    classes: str = "all"
    """Class numbers such as 207,360 or 0-9, or all."""
    per_class: int = 8
    """Images of each class."""
    cfg: float = 1.5
    """Guidance: its weight grows linearly from 0 at the coarsest scale to cfg at the finest."""
    top_k: int = 900
    """Draw from the k most probable codes; 0 is no limit."""
    top_p: float = 0.96
    """Draw from the most probable codes that together have this probability; 0 is no limit."""
    seed: int = 0
    """Image i is a function of the seed and i, whatever the batch size."""
    batch_size: int = 50
    """Images at a time. In fp32 the keys and values of 50 images take 9 GB (VAR-d16) to 31 GB (VAR-d30)."""
    smooth: bool = False
    """Mix codes instead of drawing one: prettier, but never for evaluation."""
    rng: Literal["image", "var"] = "image"
    """var: VAR's own order of draws, for comparisons (one batch)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the model's weights and activations."""
    compiled: bool = False
    """Compile the blocks first, which takes a minute or so for each batch size: for many images on a GPU."""


def parse(argv: list[str]) -> SampleOptions:
    """Parses the options. Wrong words end the process with a message; values out of range raise UserError."""
    options = tyro.cli(SampleOptions, prog="mepa sample", args=argv)
    for name, value in (("per-class", options.per_class), ("batch-size", options.batch_size)):
        if value < 1:
            raise UserError(f"--{name}: expected at least 1, got {value}")
    return options


def main(argv: list[str]) -> None:
    options = parse(argv)
    log.make_stdout_a_log()
    from mepa_ds.generation.class_names import caption, names_beside
    from mepa_ds.images.pictures import save_grid
    from mepa_ds.models.transformer import NextScaleTransformer
    from mepa_ds.tokenizer.tokenizer import Tokenizer

    device = distributed.device_of(distributed.read_launch())
    model = NextScaleTransformer.open(options.weights, options.scales, num_heads=options.num_heads, depth=options.depth)
    model = model.to(device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    tokenizer = Tokenizer.open(options.tokenizer, model.config.scales, phi_ratio=options.phi_ratio).to(device)
    classes = parse_classes(options.classes, model.config.num_classes)
    labels = [label for label in classes for _ in range(options.per_class)]
    draw = _sampler(model, tokenizer, labels, options)
    is_grid = options.out.suffix.lower() == ".png"
    check_writable(options.out.parent if is_grid else options.out, "--out")
    started = time.perf_counter()
    if is_grid:
        with _progress(len(labels)) as bar:
            images = [draw(part, bar) for part in _batches(len(labels), options)]
        names = names_beside(options.weights)
        save_grid(
            torch.cat(images),
            options.out,
            options.per_class,
            title=f"cfg {options.cfg:g}, top-k {options.top_k}, top-p {options.top_p:g}, seed {options.seed}",
            rows=[caption(label, names) for label in classes],
        )
        drawn = len(labels)
    else:
        drawn = _fill_directory(labels, options, draw)
    seconds = time.perf_counter() - started
    print(f"{drawn} images in {seconds:.1f} s ({drawn / seconds:.1f} images/s): {options.out}")


def _progress(count: int) -> Progress:
    return Progress(total=count, desc="sampling", unit="image")


def _batches(count: int, options: SampleOptions) -> list[range]:
    step = count if options.rng == "var" else options.batch_size
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def _sampler(model, tokenizer, labels: list[int], options: SampleOptions) -> Callable[[range, Progress], torch.Tensor]:  # type: ignore[no-untyped-def]
    """Draws the images of a range: (B, 3, H, W) in [0, 1] on the CPU."""
    from mepa_ds.generation.sampling import sample

    def draw(part: range, bar: Progress) -> torch.Tensor:
        try:
            images = sample(
                model,
                tokenizer,
                labels[part.start : part.stop],
                cfg=options.cfg,
                top_k=options.top_k,
                top_p=options.top_p,
                seed=options.seed,
                first_index=part.start,
                smooth=options.smooth,
                rng=options.rng,
                compiled=options.compiled,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of GPU memory with {len(part)} images at once; use a smaller --batch-size, or --precision bf16"
            ) from error
        bar.update(len(part))
        return images.cpu()

    return draw


def _fill_directory(labels: list[int], options: SampleOptions, draw: Callable[[range, Progress], torch.Tensor]) -> int:
    """One PNG for each image, batch by batch: 50 000 would not fit into memory. Returns how many were drawn.

    Batches that an earlier start has finished are left as they are; one with an empty or cut file is drawn again.

    Raises:
        UserError: an image was made with other options.
    """
    from mepa_ds.images.pictures import is_whole_png, made_by_of, save_images

    made_by, drawn = _made_by(options), 0
    paths = [options.out / f"class{label:04d}_{number:05d}.png" for number, label in enumerate(labels)]
    _check_others(options.out, paths, made_by)
    with _progress(len(labels)) as bar:
        for part in _batches(len(labels), options):
            mine = paths[part.start : part.stop]
            there = [path for path in mine if is_whole_png(path)]
            for path in there[:1]:
                if made_by_of(path) != made_by:
                    raise UserError(f"{path}: made by other weights or options; remove it, or choose another --out")
            if len(there) == len(mine):
                bar.update(len(mine))
                continue
            with naming_full_disks(options.out):
                save_images(draw(part, bar), mine, made_by)
            drawn += len(mine)
    return drawn


def _check_others(directory: Path, paths: list[Path], made_by: str) -> None:
    """Refuses a directory with images of other kinds, since scores count all images in a directory.

    Other jobs may generate other classes into the same directory, with seeds of their own; everything else must be the
    same. One image of each class is opened.

    Raises:
        UserError: the directory has an image that neither this start nor such a job would make.
    """
    from mepa_ds.images.decoding import is_image_name
    from mepa_ds.images.pictures import made_by_of

    mine, my_classes = {path.name for path in paths}, {_class_of(path) for path in paths}
    images = sorted(path for path in directory.glob("*") if is_image_name(path.name))
    others = {_class_of(path): path for path in images if path.name not in mine}
    for name, path in others.items():
        if name in my_classes or _shared_facts(made_by_of(path)) != _shared_facts(made_by):
            raise UserError(
                f"{path}: made by another start with other weights or options, and scores count every image in a "
                "directory; remove it, or choose another --out"
            )


def _class_of(path: Path) -> str:
    return path.name.partition("_")[0]


def _shared_facts(made_by: str | None) -> dict[str, object] | None:
    """The facts that are equal for jobs that share a directory."""
    facts = json.loads(made_by) if made_by else None
    return facts and {name: value for name, value in facts.items() if name not in ("classes", "seed")}


def _made_by(options: SampleOptions) -> str:
    """Everything that an image is a function of. Weights that were replaced are noticed by their time."""
    weights = options.weights / "config.json" if options.weights.is_dir() else options.weights
    facts = {
        "weights": f"{options.weights.resolve()} of {weights.stat().st_mtime:.0f}",
        "tokenizer": str(options.tokenizer.resolve()),
        "classes": options.classes,
        **{name: getattr(options, name) for name in _DECIDES},
        **{name: getattr(options, name) for name in _TOLD if getattr(options, name) is not None},
    }
    return json.dumps(facts)


def parse_classes(text: str, num_classes: int) -> list[int]:
    """`all`, or numbers and ranges such as `1,3,5-9`."""
    if text == "all":
        return list(range(num_classes))
    classes: list[int] = []
    for item in text.split(","):
        first, separator, last = item.strip().partition("-")
        if not first.isdecimal() or (separator and not last.isdecimal()):
            raise UserError(f"--classes: expected numbers and ranges such as 1,3,5-9, or all; got {text!r}")
        if int(last or first) < int(first):
            raise UserError(f"--classes: the range {item.strip()} ends before it begins; write {last}-{first}")
        if int(last or first) >= num_classes:
            raise UserError(f"--classes: {item.strip()} goes beyond the model's classes 0..{num_classes - 1}")
        classes += range(int(first), int(last or first) + 1)
    return classes


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
