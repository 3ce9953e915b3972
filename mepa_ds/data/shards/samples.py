"""The rule that says what a sample of a tar is, for readers, tools and loader alike.

A sample is the members `KEY.EXT` with the same key, as WebDataset defines it: the key ends at the first dot of the
file name. A sample of images is one member with an image's extension and perhaps a label, `KEY.cls`. Names that begin
with a dot, of files or folders, and what lies in `__MACOSX` are left out: editors and file managers make them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Literal

from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.tar import TarMember, list_members
from mepa_ds.errors import DamagedError
from mepa_ds.images.decoding import EXTENSIONS
from mepa_ds.safety.text import printable

Kind = Literal["images", "tokens", "features"]

LABEL_EXTENSION = "cls"
MOST_MEMBER_BYTES = 1 << 29
"""Largest member that is read into memory as a whole: an image of 512 MiB."""
_MOST_LABEL_BYTES = 1 << 10
IMAGE_EXTENSIONS = EXTENSIONS

HIDDEN = "hidden names, as macOS packs them beside files"
NO_SAMPLE = "members that are neither image nor label"
DOTTED = "images or labels with more dots in their names, whose keys end at the first"
LABELS_ALONE = "labels without an image"
NO_SHARDS = "files or folders that are no shards"

_HIDDEN_PART = re.compile(r"(?:^|/)(?:\.+[^./]|__MACOSX(?:/|$))")

Samples = dict[str, dict[str, tuple[int, TarMember]]]
"""Key -> extension -> (number of the member in its tar, member), in the order of the tar."""


def most_bytes(extension: str) -> int:
    """How many bytes a member of this extension may have to be read."""
    return _MOST_LABEL_BYTES if extension == LABEL_EXTENSION else MOST_MEMBER_BYTES


def is_hidden(name: str) -> bool:
    """Whether a path, or a folder in it, is an editor's or a file manager's: .ipynb_checkpoints, __MACOSX, ._1.jpg."""
    return _HIDDEN_PART.search(name) is not None


def image_extension(extensions: Collection[str], where: str) -> str:
    """The extension of a sample's image.

    Raises:
        DamagedError: there is no image, or there are several and no rule can know which one is meant.
    """
    found = [extension for extension in IMAGE_EXTENSIONS if extension in extensions]
    if not found:
        raise DamagedError(
            f"{where}: has no image, only {sorted(extensions)}; expected one of {', '.join(IMAGE_EXTENSIONS)}"
        )
    if len(found) > 1:
        raise DamagedError(
            f"{where}: has several images, .{' and .'.join(found)}; keep one of each sample in the shards, for "
            f"example by: tar --delete --wildcards '*.{found[-1]}' -f SHARD"
        )
    return found[0]


def split_member_name(name: str) -> tuple[str, str]:
    """`a/b/n0.x.jpg` -> (`a/b/n0`, `x.jpg`); the extension is lower case. No dot: the extension is empty."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _split_at_last_dot(name: str) -> tuple[str, str]:
    """`a/b/n0.x.jpg` -> (`a/b/n0.x`, `jpg`)."""
    key, _, extension = name.rpartition(".")
    return key, extension.lower()


def tar_files(directory: Path, left_out: LeftOut | None = None) -> list[Path]:
    """The shards in a directory, in alphabetical order.

    Args:
        left_out: collects everything else in the directory, except indices and offset indices of offsets.
    """
    shards = []
    for path in sorted(directory.iterdir()):
        if path.suffix == ".tar" and not is_hidden(path.name):
            shards.append(path)
        elif left_out is not None and path.suffix != ".json" and not path.name.endswith(".idx.npz"):
            left_out.add(NO_SHARDS, path.name + "/" * path.is_dir())
    return shards


def image_samples(path: Path, left_out: LeftOut, dots_in_keys: bool = False) -> Samples:
    """The samples of a tar of images: of each its image, and its label if it has one.

    Args:
        left_out: collects all other members.
        dots_in_keys: let keys end at the last dot of the name, in a tar where every image and every label then belongs
            to a whole sample (an image and its label).

    Raises:
        DamagedError: the tar is damaged; a sample has two images, or two members of one name; names with dots make
            samples without an image.
    """
    members = visible_members(path, left_out)
    samples = grouped(members, split_member_name, path, _is_image_or_label)
    if any("." in extension for found in samples.values() for extension in found):
        by_last_dot = grouped(members, _split_at_last_dot, path, _is_image_or_label)
        lacking = next((key for key, found in samples.items() if _lacks_its_image(found)), None)
        if all(LABEL_EXTENSION in found and len(found) > 1 for found in by_last_dot.values()):
            if not dots_in_keys:
                raise DamagedError(
                    f"{path}: {_of_dots(by_last_dot)}; make a set of it by mepa data build webdataset, "
                    "which takes such names"
                )
            samples = by_last_dot
        elif lacking is not None:
            raise DamagedError(
                f"{path}: sample {printable(lacking)!r} has no image, only {sorted(samples[lacking])}: a key ends at "
                "the first dot of the file name; give the files names with one dot (mv, rename), and pack them again"
            )
    return _with_images(members, samples, path, left_out)


def _lacks_its_image(found: Iterable[str]) -> bool:
    """Whether no extension of a sample is an image's, but one of them ends in an image's (`59.jpg`)."""
    return not any(map(_is_image, found)) and any("." in ext and _is_image(ext.rpartition(".")[2]) for ext in found)


def _of_dots(samples: Samples) -> str:
    key = next((key for key in samples if "." in key.rpartition("/")[2]), "")
    return f"the name {printable(key)!r} has a dot, but a key ends at the first dot of the file name"


def _with_images(members: list[TarMember], samples: Samples, path: Path, left_out: LeftOut) -> Samples:
    """The samples that have an image, each with its image and label; everything else is left out."""
    whole: Samples = {}
    taken = set[int]()
    for key, found in samples.items():
        if not any(map(_is_image, found)):
            continue
        image = image_extension(found, f"{path}: sample {printable(key)!r}")
        whole[key] = {extension: found[extension] for extension in found if extension in (image, LABEL_EXTENSION)}
        taken.update(number for number, _ in whole[key].values())
    for number, (name, _, _) in enumerate(members):
        if number not in taken:
            extension = split_member_name(name)[1]
            reason = DOTTED if "." in extension else LABELS_ALONE
            left_out.add(reason if _is_image_or_label(extension) else NO_SAMPLE, name)
    return whole


def _is_image(extension: str) -> bool:
    return extension in IMAGE_EXTENSIONS


def _is_image_or_label(extension: str) -> bool:
    """Whether the part of an extension behind its last dot is an image's or a label's."""
    return extension.rpartition(".")[2] in (*IMAGE_EXTENSIONS, LABEL_EXTENSION)


def visible_members(path: Path, left_out: LeftOut) -> list[TarMember]:
    """The files of a tar whose names are not hidden."""
    visible = []
    for member in list_members(path, left_out):
        if is_hidden(member.name):
            left_out.add(HIDDEN, member.name)
        else:
            visible.append(member)
    return visible


def grouped(
    members: Iterable[TarMember],
    split: Callable[[str], tuple[str, str]],
    path: Path,
    wanted: Callable[[str], bool],
) -> Samples:
    """Members by key and extension. Raises DamagedError for two members of the same key and extension."""
    samples: Samples = {}
    for number, member in enumerate(members):
        key, extension = split(member.name)
        if not key or key.endswith("/") or not extension or not wanted(extension):
            continue
        found = samples.setdefault(key, {})
        if extension in found:
            raise DamagedError(
                f"{path}: sample {printable(key)!r} has two members .{extension}: it comes twice; keys must be unique "
                "within a shard, make it again"
            )
        found[extension] = (number, member)
    return samples
