"""What a sample of a tar is: one rule for readers, tools and loader.

A sample is the members `KEY.EXT` with the same key, as WebDataset defines it: the key ends at the first dot of the
file name. A sample of images is one member with an image's extension and perhaps a label, `KEY.cls`. Names that begin
with a dot, of files or folders, and what lies in `__MACOSX` are left out: editors and file managers make them.

Legend: N samples of a shard, M member extensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mepa_ds.data.left_out import LeftOut, printable
from mepa_ds.data.tar import TarMember, list_members
from mepa_ds.errors import DamagedError

Kind = Literal["images", "tokens", "features"]

LABEL_EXTENSION = "cls"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff")

HIDDEN = "hidden names, as macOS packs them beside files"
NO_SAMPLE = "members that are neither image nor label"
DOTTED = "images or labels with more dots in their names, whose keys end at the first"
LABELS_ALONE = "labels without an image"
NO_SHARDS = "files or folders that are no shards"

_LABEL_DIGITS = 18
_MOST_EXTENSIONS = 32
"""Of one shard: a table has a column for each."""
_ANEW = "make the shard again, or a set of it by data_tools/build_shards.py webdataset"

_Samples = dict[str, dict[str, tuple[int, TarMember]]]
"""Key -> extension -> (number of the member in its tar, member)."""


@dataclass(frozen=True)
class SampleTable:
    """Where the samples of one shard lie."""

    keys_N: NDArray[np.bytes_]
    extensions: tuple[str, ...]
    offsets_NM: NDArray[np.int64]
    """Byte offset of each member's data in the tar."""
    sizes_NM: NDArray[np.int64]
    """Bytes of each member; -1 where a sample has no such member."""
    labels_N: NDArray[np.int64] | None = None
    """What the `cls` members say, so that they need not be read; None when they have not been looked at."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Members that belong to no sample; of shards that others made."""

    def __len__(self) -> int:
        return len(self.keys_N)

    def key(self, row: int) -> str:
        return bytes(self.keys_N[row]).decode()

    @classmethod
    def of(cls, samples: list[tuple[str, dict[str, tuple[int, int]]]]) -> SampleTable:
        """From (key, {extension: (offset, size)}) in order."""
        extensions = tuple(dict.fromkeys(extension for _, members in samples for extension in members))
        places = np.array(
            [[members.get(extension, (0, -1)) for extension in extensions] for _, members in samples], np.int64
        ).reshape(len(samples), len(extensions), 2)
        keys = np.array([key.encode() for key, _ in samples], dtype=np.bytes_)
        return cls(keys, extensions, places[..., 0].copy(), places[..., 1].copy())


def label_number(data: bytes) -> int | None:
    """The number in a `cls` member; None for anything else, and for what int64 does not hold."""
    text = data.strip()
    return int(text) if text.isdigit() and len(text) <= _LABEL_DIGITS else None


def is_hidden(name: str) -> bool:
    """Whether a path, or a folder on it, is of an editor or a file manager: .ipynb_checkpoints, __MACOSX, ._1.jpg."""
    return any((part.startswith(".") and part.strip(".")) or part == "__MACOSX" for part in name.split("/"))


def is_image_name(name: str) -> bool:
    """By its extension, in small letters or capitals. Whether the bytes are an image is found when they are decoded."""
    stem, extension = _split_at_last_dot(name.rpartition("/")[2])
    return bool(stem) and extension in IMAGE_EXTENSIONS


def image_extension(extensions: Collection[str], where: str) -> str:
    """Which of a sample's members is its image.

    Raises:
        DamagedError: none is, or several are: which one is meant, no rule can know.
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
        left_out: takes what is there besides, but for indices and tables of offsets.
    """
    found = sorted(directory.iterdir())
    shards = [path for path in found if path.suffix == ".tar" and not is_hidden(path.name)]
    for path in found if left_out is not None else ():
        if path.suffix != ".json" and not path.name.endswith(".idx.npz") and path not in shards:
            left_out.add(NO_SHARDS, path.name + "/" * path.is_dir())
    return shards


def image_samples(path: Path, left_out: LeftOut, dots_in_keys: bool = False) -> list[tuple[str, dict[str, TarMember]]]:
    """(key, {extension: member}) of each sample of a tar: its image, and its label if it has one.

    Args:
        left_out: takes all other members.
        dots_in_keys: let keys end at the last dot of the name in a tar where this makes a whole sample, image and
            label, of each image and label, and the first dot does not.

    Raises:
        DamagedError: the tar is damaged; a sample has two images, or two members of one name; keys have dots.
    """
    return [(key, _places(members)) for key, members in _image_samples(path, left_out, dots_in_keys).items()]


def _places(members: dict[str, tuple[int, TarMember]]) -> dict[str, TarMember]:
    return {extension: member for extension, (_, member) in members.items()}


def _image_samples(path: Path, left_out: LeftOut, dots_in_keys: bool) -> _Samples:
    members = _visible(path, left_out)
    samples = _grouped(members, split_member_name, path, _is_image_or_label)
    lacking, is_dotted = None, False
    for key, found in samples.items():
        extensions = {extension for extension in found if "." in extension}
        is_dotted = is_dotted or bool(extensions)
        if lacking is None and any(map(is_image_name, extensions)) and not any(map(_is_image, found)):
            lacking = key
    if is_dotted:
        by_last_dot = _grouped(members, _split_at_last_dot, path, _is_image_or_label)
        if all(LABEL_EXTENSION in found and len(found) > 1 for found in by_last_dot.values()):
            if not dots_in_keys:
                raise DamagedError(
                    f"{path}: {_of_dots(by_last_dot)}; make a set of it by data_tools/build_shards.py webdataset, which "
                    "takes such names"
                )
            samples = by_last_dot
        elif lacking is not None:
            raise DamagedError(
                f"{path}: sample {printable(lacking)!r} has no image, only {sorted(samples[lacking])}: a key ends at "
                "the first dot of the file name; give the files names with one dot (mv, rename), and pack them again"
            )
    return _with_images(members, samples, path, left_out)


def _of_dots(samples: _Samples) -> str:
    key = next((key for key in samples if "." in key.rpartition("/")[2]), "")
    return f"the name {printable(key)!r} has a dot, but a key ends at the first dot of the file name"


def _with_images(members: list[TarMember], samples: _Samples, path: Path, left_out: LeftOut) -> _Samples:
    """The samples that have an image, and of each the image and the label; all else is left out."""
    whole: _Samples = {}
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
    """By what stands behind the last dot."""
    return extension.rpartition(".")[2] in (*IMAGE_EXTENSIONS, LABEL_EXTENSION)


def _visible(path: Path, left_out: LeftOut) -> list[TarMember]:
    members = list_members(path, left_out)
    for member in members:
        if is_hidden(member.name):
            left_out.add(HIDDEN, member.name)
    return [member for member in members if not is_hidden(member.name)]


def _grouped(
    members: Iterable[TarMember],
    split: Callable[[str], tuple[str, str]],
    path: Path,
    wanted: Callable[[str], bool],
) -> _Samples:
    """Members by key and extension. Raises DamagedError for two of both."""
    samples: _Samples = {}
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


def scan_tar(path: Path, kind: Kind) -> SampleTable:
    """The sample table of a tar that has none stored: WebDataset shards that others made.

    Raises:
        DamagedError: as `image_samples`; or keys that are not UTF-8, or whose members do not lie side by side.
    """
    left_out = LeftOut()
    if kind == "images":
        samples = _image_samples(path, left_out, dots_in_keys=False)
    else:
        members = _visible(path, left_out)
        samples = _grouped(members, split_member_name, path, bool)
        taken = {number for found in samples.values() for number, _ in found.values()}
        for number, member in enumerate(members):
            if number not in taken:
                left_out.add(NO_SAMPLE, member.name)
    _check_keys(path, samples)
    table = SampleTable.of(
        [(key, {ext: (m.offset, m.size) for ext, (_, m) in found.items()}) for key, found in samples.items()]
    )
    return replace(table, left_out=left_out)


def _check_keys(path: Path, samples: _Samples) -> None:
    for key in samples:
        if (shown := printable(key)) != key:
            raise DamagedError(f"{path}: the name of sample {shown!r} is not UTF-8; {_ANEW}")
    numbered = sorted((number, key) for key, found in samples.items() for number, _ in found.values())
    seen = set[str]()
    for key, _ in itertools.groupby(key for _, key in numbered):
        if key in seen:
            raise DamagedError(f"{path}: the members of sample {key!r} do not lie side by side; {_ANEW}")
        seen.add(key)
    extensions = {extension for found in samples.values() for extension in found}
    if len(extensions) > _MOST_EXTENSIONS:
        raise DamagedError(
            f"{path}: has members of {len(extensions)} kinds ({', '.join(sorted(extensions)[:3])}, ...): a key ends at "
            "the first dot of the file name; make the shard again, with names that have one dot"
        )
