"""`mepa sample`: images of chosen classes as one PNG grid, or one PNG each."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mepa_ds import distributed, log
from mepa_ds.command_line import entry
from mepa_ds.command_line.paths import check_one_of
from mepa_ds.command_line.scales import Scales
from mepa_ds.errors import UserError
from mepa_ds.files import check_writable, identity_of_weights
from mepa_ds.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from mepa_ds.models.transformer import NextScaleTransformer
    from mepa_ds.tokenizer.tokenizer import Tokenizer

_DECIDES = ("per_class", "cfg", "top_k", "top_p", "seed", "smooth", "rng", "precision")
_TOLD = ("num_heads", "depth", "phi_ratio")  # what foreign weights do not tell


@dataclass
class SampleOptions:
    """Generates images class by class: one row a class in the grid, with its name where the data have one.

    mepa sample --run RUN --out samples.png: of the best weights of a run, or of a project of `mepa init`.

    mepa sample --weights FILE --tokenizer FILE --out samples.png: of any weights.
    """

    out: Path
    """PNG file of the grid. A directory gets one PNG for each image instead; a killed command continues there."""
    run: Path | None = None
    """A run (its output_dir), or a project with one run: its best weights are taken, and its tokenizer."""
    weights: Path | None = None
    """Instead of --run: a directory of safetensors + config.json (<output_dir>/last of a run), a checkpoint, or VAR's
    var_d16.pth."""
    tokenizer: Path | None = None
    """The model's tokenizer: its directory, or VAR's vae_ch160v4096z32.pth; a run tells its own."""
    scales: Scales = None
    """Sides of the token maps, such as 1 2 3 4, if VAR weights do not tell them and they are not VAR's own."""
    num_heads: int | None = None
    """Number of attention heads, if VAR weights do not tell it (those without QK normalisation)."""
    depth: int | None = None
    """Number of blocks, if VAR weights do not tell it and it is not width / 64."""
    phi_ratio: float | None = None
    """Share of phi's convolution, if a tokenizer of VAR's architecture does not tell it and it is not 0.5."""
    classes: str = "all"
    """Numbers, ranges and names, such as 207,360 or 0-9 or "Ankle boot,Bag", or all. A name with a comma, or one that
    reads as a number, stands in double quotes within: '"tench, Tinca tinca",3'."""
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
    check_one_of(options.run, options.weights)
    return options


def main(argv: list[str]) -> None:
    options = parse(argv)
    log.make_stdout_a_log()
    import torch

    from mepa_ds.checkpoint.run_models import find_chosen
    from mepa_ds.generation.class_names import parse_classes
    from mepa_ds.tokenizer.tokenizer import Tokenizer

    device = distributed.device_of(distributed.read_launch())
    found = find_chosen(options.run, options.weights)
    model = found.open(options.scales, num_heads=options.num_heads, depth=options.depth)
    model = model.to(device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    tokenizer = Tokenizer.open(found.tokenizer(options.tokenizer), model.config.scales, phi_ratio=options.phi_ratio)
    tokenizer = tokenizer.to(device)
    classes = parse_classes(options.classes, model.config.num_classes, model.class_names)
    if options.run is not None:
        log.say(f"weights: {found.source}" + ("" if found.step is None else f", step {found.step}"))
    is_grid = options.out.suffix.lower() == ".png"
    check_writable(options.out.parent if is_grid else options.out, "--out")
    started = time.perf_counter()
    if is_grid:
        drawn = _draw_grid(model, tokenizer, classes, options)
    else:
        made_by = _made_by(options, weights=identity_of_weights(model.state_dict()), tokenizer=tokenizer.identity)
        drawn = _fill(model, tokenizer, classes, options, made_by)
    seconds = time.perf_counter() - started
    log.say(f"{drawn} images in {seconds:.1f} s ({drawn / seconds:.1f} images/s): {options.out}")


def _draw_grid(model: NextScaleTransformer, tokenizer: Tokenizer, classes: list[int], options: SampleOptions) -> int:
    import torch

    from mepa_ds.generation.class_names import caption, which_of
    from mepa_ds.images.pictures import save_grid

    labels = [label for label in classes for _ in range(options.per_class)]
    draw = _sampler(model, tokenizer, labels, options)
    with _progress(len(labels)) as bar:
        images = [draw(part, bar) for part in _batches(len(labels), options)]
    save_grid(
        torch.cat(images),
        options.out,
        options.per_class,
        title=f"cfg {options.cfg:g}, top-k {options.top_k}, top-p {options.top_p:g}, seed {options.seed}"
        + which_of(classes, model.config.num_classes),
        rows=[caption(label, model.class_names) for label in classes],
    )
    return len(labels)


def _fill(
    model: NextScaleTransformer, tokenizer: Tokenizer, classes: list[int], options: SampleOptions, made_by: str
) -> int:
    from mepa_ds.generation.sample_files import fill_directory, image_paths

    labels = [label for label in classes for _ in range(options.per_class)]
    draw = _sampler(model, tokenizer, labels, options)
    paths = image_paths(options.out, labels, model.class_names)
    with _progress(len(labels)) as bar:
        return fill_directory(
            paths,
            _batches(len(labels), options),
            made_by,
            lambda part: draw(part, bar),
            lambda count: bar.update(count),
        )


def _progress(count: int) -> Progress:
    return Progress(total=count, desc="sampling", unit="image")


def _batches(count: int, options: SampleOptions) -> list[range]:
    step = count if options.rng == "var" else options.batch_size
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def _sampler(
    model: NextScaleTransformer, tokenizer: Tokenizer, labels: list[int], options: SampleOptions
) -> Callable[[range, Progress], Tensor]:
    """Draws the images of a range: (B, 3, H, W) in [0, 1] on the CPU."""
    import torch

    from mepa_ds.generation.sampling import sample

    def draw(part: range, bar: Progress) -> Tensor:
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


def _made_by(options: SampleOptions, **hashes: str) -> str:
    """Everything that an image is a function of, as JSON for its file. Weights are told by `hashes`: images are
    given away, and a path tells of a person and a machine."""
    facts = {
        **hashes,
        "classes": options.classes,
        **{name: getattr(options, name) for name in _DECIDES},
        **{name: getattr(options, name) for name in _TOLD if getattr(options, name) is not None},
    }
    return json.dumps(facts)


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
