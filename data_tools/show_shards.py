"""A contact sheet of shard sets: `mepa data show IMAGES --tokens T --tokenizer P --features F`.

One row a sample: the image, what the tokenizer reconstructs from its token maps up to each scale, and the feature map
with its three strongest principal components (over the samples shown) as red, green and blue.

Legend: B samples shown, L tokens, N patches, C teacher width.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes long to import
    from mepa_ds.interrupts import raise_interrupts

    raise_interrupts()

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.command_line.remote import RemoteSchemes
from mepa_ds.data.codecs import FEATURES_EXT, SCALE_EXT
from mepa_ds.data.images import decode_sample
from mepa_ds.data.remote.schemes import allow
from mepa_ds.data.shard_set import ShardSet, parse_label
from mepa_ds.data.shards.samples import LABEL_EXTENSION
from mepa_ds.data.training_sets import TOKENS_EXT, TrainingSets, check_siblings, open_training_sets
from mepa_ds.data_tools.precompute_sets import open_images
from mepa_ds.errors import UserError
from mepa_ds.images.pictures import save_png, to_uint8
from mepa_ds.images.resizing import fit_image
from mepa_ds.images.sheets import Pixels, Sheet, draw_sheet, resized
from mepa_ds.teachers.pca import RunningCovariance
from mepa_ds.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    images: tyro.conf.Positional[Path]
    """The image set."""
    tokens: Path | None = None
    """Its token set; needs --tokenizer."""
    tokenizer: Path | None = None
    """Directory of the tokenizer that made the tokens, or VAR's vae_ch160v4096z32.pth."""
    features: Path | None = None
    """Its feature set; needs --tokens."""
    count: int = 8
    """Samples to show, evenly over the set."""
    side: int = 128
    """Pixels of a tile."""
    out: Path = Path("shards.png")
    """PNG file."""
    remote_schemes: RemoteSchemes = ()


def contact_sheet(options: Options) -> Sheet:
    """Raises UserError for sets that do not belong together."""
    for name, value in (("count", options.count), ("side", options.side)):
        if value < 1:
            raise UserError(f"--{name}: expected at least 1, got {value}")
    allow(options.remote_schemes)
    images = open_images(options.images)
    numbers = np.unique(np.linspace(0, len(images) - 1, options.count).astype(np.int64))
    titles, columns = ["image"], [[_image(images, int(number), options.side) for number in numbers]]
    if options.tokens is not None:
        sets = open_training_sets(options.tokens, options.features)
        check_siblings(images, sets.tokens)
        steps = _reconstructions(sets, numbers, _load_tokenizer(options, sets))
        titles += [f"{side} x {side}" for side in sets.scales]
        columns += [[resized(tile, options.side) for tile in column] for column in steps]
        if sets.features is not None:
            titles.append("features")
            columns.append([resized(tile, options.side, smooth=False) for tile in _pca_maps(sets, numbers)])
    elif options.features is not None:
        raise UserError("--features: give the token set too, which says what part of an image they show")
    rows = [_caption(images, int(number)) for number in numbers]
    return draw_sheet(list(zip(*columns, strict=True)), columns=titles, rows=rows, least_side=1)


def _image(images: ShardSet, number: int, side: int) -> Pixels:
    key, members = images.read(number)
    return np.asarray(fit_image(decode_sample(images, key, members), side))


def _caption(images: ShardSet, number: int) -> str:
    key, members = images.read(number)
    if LABEL_EXTENSION not in members:
        return key
    names = images.index.classes
    label = parse_label(members[LABEL_EXTENSION], len(names), lambda: f"{images.directory}: sample {key!r}")
    return f"{key}\n{names[label] if names else label}"


def _load_tokenizer(options: Options, sets: TrainingSets) -> Tokenizer:
    path = options.tokenizer
    if path is None:
        raise UserError(f"--tokenizer: the tokens were made by {sets.tokenizer.name!r}; give its directory")
    tokenizer = Tokenizer.open(path, sets.scales)
    if tokenizer.identity != sets.tokenizer.identity:
        raise UserError(
            f"--tokenizer: {path} is {tokenizer.identity}, but {sets.tokens.directory} was made by "
            f"{sets.tokenizer.name!r} ({sets.tokenizer.identity})"
        )
    return tokenizer


def _reconstructions(sets: TrainingSets, numbers: NDArray[np.int64], tokenizer: Tokenizer) -> list[list[Pixels]]:
    """For each scale, the images from the token maps up to it."""
    tokens_BL = torch.from_numpy(_read(sets.tokens, TOKENS_EXT, numbers, 1).astype(np.int64))
    return [list(to_uint8(images_B3HW.add(1).div(2))) for images_B3HW in tokenizer.decode_scales(tokens_BL)]


def _pca_maps(sets: TrainingSets, numbers: NDArray[np.int64]) -> list[Pixels]:
    """(h, w, 3) for each sample: its first view, or the whole image."""
    assert sets.features is not None
    assert sets.decoder is not None
    extra = 1 if sets.whole_maps else 0
    stored = torch.from_numpy(_read(sets.features, FEATURES_EXT, numbers, 2 + extra))
    scale = None
    if SCALE_EXT in sets.features.index.members:
        scale = torch.from_numpy(_read(sets.features, SCALE_EXT, numbers, 1 + extra))
    features = sets.decoder(stored, scale)
    if not sets.whole_maps:
        side = sets.feature_grid_side
        assert side is not None
        features = features.unflatten(1, (side, side))
    covariance = RunningCovariance(features.shape[-1])
    covariance.add(features.flatten(0, -2))
    mean, components, _ = covariance.principal_components(min(3, features.shape[-1]))
    colours = (features - mean) @ components.T
    low, high = (torch.quantile(colours.flatten(0, -2)[:100_000], q, dim=0) for q in (0.02, 0.98))
    colours = ((colours - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    colours = torch.nn.functional.pad(colours, (0, 3 - colours.shape[-1]))
    return list((colours * 255).round().byte().numpy())


def _read(shards: ShardSet, extension: str, numbers: NDArray[np.int64], dimensions: int) -> NDArray[Any]:
    """One view of an array member of several samples."""
    member = shards.index.members[extension]
    assert member.shape is not None
    views = np.zeros_like(numbers) if len(member.shape) > dimensions else None
    shape = member.shape if views is None else member.shape[1:]
    out = np.empty((len(numbers), *shape), np.dtype(member.dtype))
    shards.read_arrays(numbers, extension, out, views)
    return out


def main(argv: Sequence[str] | None = None, prog: str = "show_shards.py") -> None:
    options = tyro.cli(Options, prog=prog, args=argv, description=__doc__)
    log.make_stdout_a_log()
    save_png(contact_sheet(options).pixels_HW3, options.out)
    log.say(options.out)


if __name__ == "__main__":
    entry.run(main)
