"""Makes image shards from a dataset: `mepa data build READER --out DIR ...`, or `python data_tools/build_shards.py`.

Which image stands where is decided before the first shard is written, from the listing alone: a permutation by
`--shuffle-seed`, cut into shards. So shards can be written by any number of processes and jobs, in any order, and a
run that was killed continues where it stopped; the result is the same to the byte.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes long to import
    from mepa_ds.interrupts import raise_interrupts

    raise_interrupts()

import hashlib
import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast

import numpy as np
import tyro
from PIL import Image, ImageColor

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.data.order import permutation
from mepa_ds.data.shards.index import INDEX_NAME, MadeBy, ShardEntry, ShardIndex, read_description
from mepa_ds.data.shards.samples import LABEL_EXTENSION
from mepa_ds.data.shards.writer import SCRATCH_NAME, Manifest, Sample, ShardWriter, shard_name
from mepa_ds.data_tools.pool import DEFAULT_WORKERS, unordered_map
from mepa_ds.data_tools.readers import READERS
from mepa_ds.data_tools.readers.source import COPIED_FROM, CopyingReader, Half, Reader, Source
from mepa_ds.errors import DamagedError, UserError
from mepa_ds.images.decoding import WHITE, Colour, decode_image
from mepa_ds.images.resizing import crop_square, resize_shorter
from mepa_ds.progress import Progress
from mepa_ds.safety.text import printable

_PILLOW_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_SIZE_PROBES = 64


@dataclass(frozen=True)
class Encoding:
    """How images are stored. Every image is decoded once, whatever is stored, so that none is found damaged later."""

    image_side: int | None = None
    """Resize the shorter side to this and crop the centre square; without it the original bytes are stored."""
    format: Literal["jpg", "png", "webp"] = "jpg"
    """File format of resized images."""
    quality: int = 95
    """Quality of resized JPEG and WebP images (WebP 100 is lossless)."""
    crop: Literal["centre", "none"] = "centre"
    """none: keep the whole resized image, so that random crops reach what VAR's reach."""
    background: str = "white"
    """Colour that transparent images are laid over, by name or as '#rrggbb'."""

    @property
    def colour(self) -> Colour:
        """Raises UserError for what is no colour."""
        try:
            return cast(Colour, ImageColor.getcolor(self.background, "RGB"))
        except ValueError as error:
            raise UserError(
                f"--background: {self.background!r} is no colour; give a name such as black, or '#rrggbb'"
            ) from error

    def apply(self, extension: str, data: bytes, where: str) -> tuple[str, bytes]:
        """(extension, bytes) to store. Raises DamagedError for what is no image."""
        colour = self.colour
        image = decode_image(data, where, colour, remedy="replace it")
        if self.image_side is not None:
            image = resize_shorter(image, self.image_side)
            if self.crop == "centre":
                image = crop_square(image, self.image_side)
            return self.format, _encode(image, self.format, self.quality)
        extension = "jpg" if extension == "jpeg" else extension
        is_common = extension in _PILLOW_FORMATS  # BMP, TIFF...: not what WebDataset's users expect in shards
        # Readers of original bytes lay transparent images over white.
        if not is_common or (colour != WHITE and image.tobytes() != decode_image(data, where).tobytes()):
            return "png", _encode(image, "png", self.quality)
        return extension, data


@dataclass(frozen=True)
class BuildOptions:
    """Options of every reader."""

    out: Path
    """Directory of the shard set."""
    encoding: Encoding
    shard_samples: int = 1000
    """Images in a shard."""
    shard_megabytes: int | None = None
    """Size of a shard, in place of --shard-samples: the number of images is chosen by the mean size of a few."""
    shuffle_seed: int = 0
    """The order in which images are spread over the shards."""
    hold_out: float | None = None
    """For datasets without a split: set this share of each class aside, at least one image of a class that has two.
    Which images these are depends on the listing alone [default: all images belong to one set]."""
    take: Literal["train", "heldout"] = "train"
    """With --hold-out: write the images to train on, or those that are held out."""
    on_damaged: Literal["stop", "skip"] = "stop"
    """What a file does that is no readable image: it stops the build and is named, or it is left out and recorded in
    index.json. A build that stopped continues with skip."""
    workers: int = DEFAULT_WORKERS
    """Processes; 0 works in this one."""
    num_parts: int = 1
    """Job array: split the shards into this many parts..."""
    part: int = 0
    """...and write this one (0-based). The part that finishes last writes index.json."""

    def check(self) -> None:
        """Raises UserError for numbers that make no sense."""
        least = {"shard_samples": 1, "shard_megabytes": 1, "shuffle_seed": 0, "workers": 0, "num_parts": 1}
        numbers = [(name, getattr(self, name), smallest) for name, smallest in least.items()]
        numbers += [("image_side", self.encoding.image_side, 1), ("quality", self.encoding.quality, 1)]
        for name, value, smallest in numbers:
            if value is not None and value < smallest:
                raise UserError(f"--{name.replace('_', '-')}: expected at least {smallest}, got {value}")
        if self.encoding.crop != "centre" and self.encoding.image_side is None:
            raise UserError(f"--crop {self.encoding.crop}: is for resized images; leave it out, or give --image-side")
        if self.encoding.quality > 100:
            raise UserError(f"--quality: expected 1 to 100, got {self.encoding.quality}")
        _ = self.encoding.colour
        if self.hold_out is not None and not 0 < self.hold_out < 1:
            raise UserError(f"--hold-out: expected a share between 0 and 1, such as 0.1, got {self.hold_out:g}")
        if self.hold_out is None and self.take == "heldout":
            raise UserError("--take heldout: needs --hold-out, the share of each class that is held out")
        if not 0 <= self.part < self.num_parts:
            raise UserError(f"--part: expected 0 to {self.num_parts - 1}, got {self.part}")


@dataclass(frozen=True)
class ShardMaker:
    """Everything a worker needs to write any shard."""

    source: Source
    options: BuildOptions
    order: np.ndarray[Any, np.dtype[np.int64]]
    shard_samples: int
    manifest: Manifest

    def samples(self, shard: int, skipped: list[str]) -> Iterator[Sample]:
        start = shard * self.shard_samples
        for place in range(start, min(start + self.shard_samples, len(self.order))):
            number = int(self.order[place])
            where = self.source.describe(number)
            try:
                extension, data = self.options.encoding.apply(*self.source.load(number), where)
            except DamagedError as error:
                if self.options.on_damaged == "stop":
                    raise UserError(f"{error}; or run again with --on-damaged skip, which leaves it out") from error
                skipped.append(str(error))
                continue
            label = str(self.source.label(number)).encode()
            yield f"{place:09d}", {extension: data, LABEL_EXTENSION: label}


def build(reader: Reader, options: BuildOptions) -> ShardIndex | None:
    """Writes one part of a set; returns the index if the set is now complete."""
    options.check()
    scratch = options.out / SCRATCH_NAME
    if scratch.is_symlink():  # it is written in, and removed in the end
        raise UserError(f"--out: {scratch} is a link; remove it, and run again")
    if (finished := _finished(reader, options)) is not None:
        log.say(f"{options.out}: finished already, from the same files")
        if scratch.exists():  # of a build that was killed after its index was written
            shutil.rmtree(scratch)
        return finished
    source = reader.open(scratch if options.num_parts == 1 else None)
    if len(source) == 0:
        raise UserError(f"{source.name}: no images found")
    if options.hold_out is not None:
        source = Half(source, options.hold_out, options.take == "heldout")
        if len(source) == 0:
            raise UserError(f"{source.name}: every class has one image, so none can be held out; leave --hold-out out")
    maker = shard_maker(source, options)
    writer = ShardWriter(options.out, maker.manifest)
    mine = list(range(len(maker.manifest.shard_names)))[options.part :: options.num_parts]
    todo = [shard for shard in mine if not writer.is_complete(maker.manifest.shard_names[shard])]
    if len(todo) < len(mine):
        log.say(f"{options.out}: {len(mine) - len(todo)} of {len(mine)} shards are there already")
    num_skipped = 0
    with Progress(total=_num_samples(maker, todo), unit="image", desc=str(options.out)) as progress:
        for written in unordered_map(partial(_write_shard, maker), todo, options.workers):
            progress.update(written.num_samples + len(written.skipped))
            num_skipped += len(written.skipped)
            for message in written.skipped:
                progress.write(f"skipped: {message}")
    if num_skipped:
        log.say(f"{options.out}: {num_skipped} damaged images left out; index.json names them")
    index = writer.finish()
    if index is not None and scratch.exists():
        shutil.rmtree(scratch)
    return index


def _finished(reader: Reader, options: BuildOptions) -> ShardIndex | None:
    """The set, if it is complete. Asked only of readers whose `open` would copy the dataset again to find that out."""
    copied_from = reader.copied_from() if isinstance(reader, CopyingReader) else None
    if copied_from is None or not (options.out / INDEX_NAME).exists():
        return None
    index = ShardIndex.read(options.out)
    settings, wanted = index.made_by.settings, {COPIED_FROM: copied_from, **_option_settings(options)}
    if settings.get("on_damaged") == "stop":  # nothing was damaged, which is the same under "skip"
        del wanted["on_damaged"]
    if options.shard_megabytes is None:
        wanted["shard_samples"] = options.shard_samples
    same = all(settings.get(name) == value for name, value in wanted.items())
    return index if same and all(read_description(options.out / shard.name) for shard in index.shards) else None


def _option_settings(options: BuildOptions) -> dict[str, Any]:
    encoding = options.encoding
    stored: dict[str, Any] = {"image_side": None}
    if encoding.image_side is not None:
        stored = {"image_side": encoding.image_side, "format": encoding.format, "quality": encoding.quality}
        if encoding.crop != "centre":
            stored["crop"] = encoding.crop
    if encoding.colour != WHITE:
        stored["background"] = "#{:02x}{:02x}{:02x}".format(*encoding.colour)
    if options.hold_out is not None:
        stored |= {"hold_out": options.hold_out, "take": options.take}
    return {**stored, "shuffle_seed": options.shuffle_seed, "on_damaged": options.on_damaged}


def shard_maker(source: Source, options: BuildOptions) -> ShardMaker:
    """Decides which image goes into which shard, and at which place."""
    for name in source.classes:
        if (shown := printable(name)) != name:
            raise UserError(
                f"{source.name}: the class name '{shown}' is not UTF-8, as index.json must be; rename the class (the "
                "program convmv does it for whole folders)"
            )
    order = permutation(options.shuffle_seed, 0, len(source))
    shard_samples = options.shard_samples
    if options.shard_megabytes is not None:
        shard_samples = max(int(options.shard_megabytes * 1e6 / _mean_bytes(source, options.encoding)), 1)
    settings = {
        **source.settings,
        **_option_settings(options),
        "shard_samples": shard_samples,
        "source": _fingerprint(source),
    }
    manifest = Manifest(
        kind="images",
        shard_names=tuple(shard_name(number) for number in range(-(-len(source) // shard_samples))),
        classes=source.classes,
        made_by=MadeBy(name=source.name, settings=settings),
    )
    return ShardMaker(source, options, order, shard_samples, manifest)


def _fingerprint(source: Source) -> str:
    """A hash of the listing: a rerun over other files must not continue with the old shards."""
    digest = hashlib.sha256()
    for number in range(len(source)):
        digest.update(f"{source.label(number)} {source.describe(number)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _mean_bytes(source: Source, encoding: Encoding) -> float:
    """Stored bytes of an image, tar headers included, from images spread over the dataset."""
    sizes = []
    for number in np.linspace(0, len(source) - 1, _SIZE_PROBES).astype(int).tolist():
        try:
            sizes.append(len(encoding.apply(*source.load(number), source.describe(number))[1]) + 2048)
        except DamagedError:  # it is met again and dealt with when its shard is written
            continue
    return float(np.mean(sizes)) if sizes else 1e5


def _num_samples(maker: ShardMaker, shards: list[int]) -> int:
    return sum(min(maker.shard_samples, len(maker.order) - shard * maker.shard_samples) for shard in shards)


def _write_shard(maker: ShardMaker, shard: int) -> ShardEntry:
    skipped: list[str] = []
    writer = ShardWriter(maker.options.out, maker.manifest)
    return writer.write_shard(maker.manifest.shard_names[shard], maker.samples(shard, skipped), skipped)


def _encode(image: Image.Image, extension: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": quality}
    if extension == "png":
        options = {}
    elif extension == "webp" and quality == 100:
        options["lossless"] = True
    image.save(buffer, _PILLOW_FORMATS[extension], **options)
    return buffer.getvalue()


if TYPE_CHECKING:
    _AnyReader = Reader
else:
    _AnyReader = Union[tuple(Annotated[reader, tyro.conf.subcommand(name)] for name, reader in READERS.items())]  # noqa: UP007


@dataclass(frozen=True)
class Command:
    """The parsed command line."""

    reader: _AnyReader
    """Where the images come from."""
    options: BuildOptions


def parse(argv: Sequence[str] | None = None, prog: str = "build_shards.py") -> Command:
    """Parses the words of a command line (None: the process's own). Wrong words end the process with a message."""
    markers = (tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    return tyro.cli(Command, prog=prog, args=argv, description=__doc__, config=markers)


def main(argv: Sequence[str] | None = None, prog: str = "build_shards.py") -> None:
    command = parse(argv, prog)
    log.make_stdout_a_log()
    reader, options = command.reader, command.options
    index = build(reader, options)
    if index is None:
        log.say(
            f"{options.out}: part {options.part} of {options.num_parts} is done, other parts are still to be written"
        )
    else:
        log.say(f"{options.out}: {index.num_samples} images, {len(index.classes)} classes, {len(index.shards)} shards")


if __name__ == "__main__":
    entry.run(main)
