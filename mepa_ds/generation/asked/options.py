"""The options of `mepa sample`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from mepa_ds.command_line.by_scale import Counts, Numbers
from mepa_ds.command_line.scales import Scales
from mepa_ds.errors import UserError
from mepa_ds.generation.by_scale import CfgSchedule


@dataclass(kw_only=True)
class DrawingOptions:
    """How codes are drawn. What takes one value for all scales also takes one for each, the coarsest first."""

    cfg: Numbers = (1.5,)
    """Guidance: its weight grows linearly from 0 at the coarsest scale to cfg at the finest. Several: the weights of
    the scales themselves."""
    cfg_schedule: CfgSchedule = "linear"
    """constant: the weight is cfg at every scale."""
    guided_scales: tuple[int, int] | None = None
    """The first and the last scale with guidance, such as 3 7; without it, all."""
    negative: str | None = None
    """A class that guidance leads away from, instead of from no class."""
    temperature: Numbers = (1.0,)
    """Divides the logits: below 1 the probable codes become more probable."""
    top_k: Counts = (900,)
    """Draw from the k most probable codes; 0 is no limit."""
    top_p: Numbers = (0.96,)
    """Draw from the most probable codes that together have this probability; 0 is no limit."""
    towards: str | None = None
    """A second class: embeddings of each class are mixed with its embedding."""
    share: float = 0.5
    """With --towards: the share of that class, 0 to 1."""
    seed: int = 0
    """Image i is a function of the seed and i, whatever the batch size."""
    smooth: bool = False
    """Mix codes instead of drawing one: prettier, but never for evaluation."""
    rng: Literal["image", "var"] = "image"
    """var: VAR's own order of draws, for comparisons (one batch)."""


@contextmanager
def named_as_options() -> Iterator[None]:
    """The sampler's refusals name its arguments (`top_k`); within, they name the options (`--top-k`)."""
    try:
        yield
    except UserError as error:
        name, colon, said = str(error).partition(": ")
        if not colon or name not in {field.name for field in fields(DrawingOptions)}:
            raise
        raise UserError(f"--{name.replace('_', '-')}: {said}") from error


@dataclass(kw_only=True)
class EditingOptions:
    """What stays of a given image."""

    image: Path | None = None
    """An image to edit, or to vary; it is brought to the model's size as in training."""
    repaint: Path | None = None
    """With --image: a picture of its size that is white where the image is painted anew, and black where it stays:
    in-painting, out-painting, class-conditional edits."""
    keep_scales: int | None = None
    """With --image: keep so many of the coarsest scales, and draw the others anew (variations)."""


@dataclass(kw_only=True)
class SampleOptions(EditingOptions, DrawingOptions):
    """Generates images class by class: one row a class in the grid, with its name where the data have one.

    mepa sample --run RUN --out samples.png: of the best weights of a run, or of a project of `mepa init`.

    mepa sample --weights FILE --tokenizer FILE --out samples.png: of any weights.

    mepa sample --run RUN --image PHOTO --repaint MASK --classes 3 --out edited.png: paints a part of an image anew.
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
    """Numbers, ranges and names, such as 207,360 or 0-9 or "Ankle boot,Bag"; or all; or none, for images of no class. A
    name with a comma, or one that reads as a number, stands in double quotes within: '"tench, Tinca tinca",3'."""
    per_class: int = 8
    """Images of each class."""
    strips: bool = False
    """Show each image as a strip, from the coarsest scale to the finest; only for a grid."""
    batch_size: int = 50
    """Images at a time. In fp32 the keys and values of 50 images take 9 GB (VAR-d16) to 31 GB (VAR-d30)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the model's weights and activations."""
    compiled: bool = False
    """Compile the blocks first, which takes a minute or so for each batch size: for many images on a GPU."""

    @property
    def is_grid(self) -> bool:
        return self.out.suffix.lower() == ".png"

    def check(self) -> None:
        """Raises UserError for options that exclude or need each other, and for counts below 1."""
        for name, value in (("per-class", self.per_class), ("batch-size", self.batch_size)):
            if value < 1:
                raise UserError(f"--{name}: expected at least 1, got {value}")
        if self.image is None and (self.repaint is not None or self.keep_scales is not None):
            option = "--repaint" if self.repaint is not None else "--keep-scales"
            raise UserError(f"{option} says what stays of an image; give it by --image")
        if self.image is not None and (self.repaint is None) == (self.keep_scales is None):
            raise UserError("--image: give one of --repaint (a mask) and --keep-scales, which say what of it stays")
        if self.share != DrawingOptions.share and self.towards is None:
            raise UserError("--share is the share of a second class; give it by --towards")
        if self.strips and not self.is_grid:
            raise UserError("--strips shows images in a grid; give --out a file that ends in .png")
