"""ImageNet's own archives: the training tar of 1000 class tars, and the validation tar with its labels."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mepa_ds.data.shards.index import ShardIndex
from mepa_ds.data.shards.left_out import LeftOut
from mepa_ds.data.shards.samples import HIDDEN, is_hidden
from mepa_ds.data.shards.tar import TarMember, list_members
from mepa_ds.data_tools.readers.tar_members import TarMembers
from mepa_ds.data_tools.readers.text_lines import read_lines
from mepa_ds.errors import UserError
from mepa_ds.images.decoding import is_image_name
from mepa_ds.progress import Progress

_MOST_MAT_BYTES = 1 << 24
_SYNSET, _NUMBER = re.compile(r"n\d{8}"), re.compile(r"\d{1,9}")


@dataclass(frozen=True)
class ImageNet:
    """ILSVRC2012_img_train.tar, or ILSVRC2012_img_val.tar with --labels."""

    tar: Path
    """The archive as downloaded: it is read in place, nothing is unpacked."""
    labels: Path | None = None
    """Labels of the validation images: a synset a line in the order of the file names, or a name and a synset a line
    such as LOC_val_solution.csv, or names and class numbers from 0 such as Caffe's val.txt (with --classes), or the
    devkit's ILSVRC2012_validation_ground_truth.txt with meta.mat beside it."""
    classes: Path | None = None
    """For validation images of only some classes, or labelled by number: a text file of all synsets, one a line in the
    order of the labels, or the shard set of the training images. By default the classes are those that the labels
    name."""

    def open(self, scratch: Path | None) -> TarMembers:
        if not self.tar.is_file():
            raise UserError(f"--tar: {self.tar}: no such file")
        if self.labels is None:
            return _open_train(self.tar)
        return _open_val(self.tar, self.labels, self.classes)


def _open_train(path: Path) -> TarMembers:
    inner, left_out = dict[str, tuple[int, int]](), LeftOut()
    for name, offset, size in list_members(path, left_out):
        synset, _, extension = name.rpartition("/")[2].rpartition(".")
        if is_hidden(name) or extension.lower() != "tar":
            left_out.add(HIDDEN if is_hidden(name) else "members that are no class tars", name)
            continue
        if synset in inner:
            raise UserError(f"--tar: {path}: holds two class tars {synset}.tar; remove one of them")
        inner[synset] = (offset, size)
    if not inner:
        raise UserError(
            f"--tar: {path}: holds no class tars such as n01440764.tar; is it the training archive? "
            "For validation images give --labels"
        )
    source = TarMembers("imagenet", tuple(sorted(inner)), paths=[path])
    for label, synset in enumerate(Progress(source.classes, "listing", unit="class")):
        offset, size = inner[synset]
        found = len(source)
        for image in _images(list_members(path, left_out, offset, size), left_out):
            source.add(0, *image, label)
        if len(source) == found:
            raise UserError(f"--tar: {path}: the class tar {synset}.tar has no images; download the archive again")
    left_out.note(path)
    return source


def _images(members: list[TarMember], left_out: LeftOut) -> list[TarMember]:
    images = []
    for member in members:
        if is_image_name(member.name) and not is_hidden(member.name):
            images.append(member)
        else:
            left_out.add(HIDDEN if is_hidden(member.name) else "members that are no images", member.name)
    return images


def _open_val(path: Path, labels: Path, class_list: Path | None) -> TarMembers:
    left_out = LeftOut()
    members = sorted(_images(list_members(path, left_out), left_out))
    left_out.note(path)
    given = None if class_list is None else _read_classes(class_list)
    synsets, known = _read_labels(labels, [_image_name(name) for name, _, _ in members], given)
    classes = known if given is None else given
    if repeated := [name for name, count in Counter(classes).items() if count > 1]:
        raise UserError(f"--classes: {class_list}: {repeated[0]!r} is there more than once; names must be unique")
    if unknown := set(synsets) - set(classes):
        raise UserError(f"--classes: {class_list}: {min(unknown)!r} is not among its {len(classes)} classes")
    source = TarMembers("imagenet", classes, paths=[path])
    label_of = {synset: label for label, synset in enumerate(classes)}
    for member, synset in zip(members, synsets, strict=True):
        source.add(0, *member, label_of[synset])
    return source


def _image_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]


def _read_classes(path: Path) -> tuple[str, ...]:
    """Synsets in the order of the labels; a line may go on with words (synset_words.txt)."""
    if path.is_dir():
        return ShardIndex.read(path, "--classes").classes
    lines = [(number, line.split()[0]) for number, line in enumerate(read_lines(path, "--classes"), 1) if line.strip()]
    for number, synset in lines:
        if not _SYNSET.fullmatch(synset):
            raise UserError(f"--classes: {path}: line {number}: {synset!r} is no synset such as n01440764")
    return tuple(synset for _, synset in lines)


def _read_labels(path: Path, names: list[str], classes: tuple[str, ...] | None) -> tuple[list[str], tuple[str, ...]]:
    """The synset of each image, in order; and all synsets that the labels know, in alphabetical order."""
    rows, named = _label_rows(path)
    if named:
        by_name = dict(rows)
        missing = [name for name in names if name not in by_name]
        if missing:
            raise UserError(f"--labels: {path}: {len(missing)} images have no label there, {missing[0]!r} among them")
        values = [by_name[name] for name in names]
    else:
        values = [value for _, value in rows]
        if len(values) != len(names):
            raise UserError(
                f"--labels: {path}: has {len(values)} labels for {len(names)} images; is it the right file?"
            )
    if not rows[0][1].isdigit():
        return values, tuple(sorted({value for _, value in rows}))
    # Beside names, numbers are places among the given classes (Caffe's val.txt); alone, they are the devkit's own.
    synsets = dict(enumerate(_numbered(path, classes))) if named else _synsets_of_devkit(path.with_name("meta.mat"))
    if unknown := sorted({int(value) for value in values} - set(synsets)):
        source = "--classes" if named else "meta.mat"
        raise UserError(f"--labels: {path}: label {unknown[0]} is out of range, {source} has {len(synsets)} classes")
    return [synsets[int(value)] for value in values], tuple(sorted(synsets.values()))


def _label_rows(path: Path) -> tuple[list[tuple[str, str]], bool]:
    """(image name, label) of each line, and whether there are names.

    Lines are all `NAME LABEL ...`, parted by blanks, tabs or commas, or all `LABEL`; labels all synsets or all numbers.
    """
    rows: list[tuple[str, str]] = []
    width, kind = 0, _SYNSET
    for number, line in enumerate(read_lines(path, "--labels"), 1):
        fields = [field for field in re.split(r'[\s,"]+', line) if field]
        if not fields or fields[0] == "ImageId":  # the heading of LOC_val_solution.csv
            continue
        name, label = ("", fields[0]) if len(fields) == 1 else (_image_name(fields[0]), fields[1])
        if not rows:
            width, kind = min(len(fields), 2), _NUMBER if label.isdigit() else _SYNSET
        if min(len(fields), 2) != width or not kind.fullmatch(label):
            raise UserError(
                f"--labels: {path}: line {number}: {line[:60]!r} is not like the lines before it, or its label is "
                "neither a synset such as n01440764 nor a number"
            )
        rows.append((name, label))
    if not rows:
        raise UserError(f"--labels: {path}: has no labels")
    return rows, width == 2


def _numbered(path: Path, classes: tuple[str, ...] | None) -> tuple[str, ...]:
    if classes is None:
        raise UserError(
            f"--labels: {path}: gives class numbers; say what they stand for with --classes: a text file of all "
            "synsets in the order of the numbers, from 0, or the shard set of the training images"
        )
    return classes


def _synsets_of_devkit(path: Path) -> dict[int, str]:
    """ILSVRC2012_ID -> synset. The devkit numbers classes in its own order, not in that of the synsets."""
    if not path.is_file():
        raise UserError(
            f"--labels: these are the devkit's own numbers, whose meaning is in meta.mat; put it beside them: {path}"
        )
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError("--labels: meta.mat is read by SciPy; pip install scipy") from error
    # Each row: ILSVRC2012_ID, WNID, words, gloss, num_children, ...; inner nodes of WordNet have children.
    if path.stat().st_size > _MOST_MAT_BYTES:
        raise UserError(f"--labels: {path}: is no meta.mat of the devkit, which has less than a megabyte")
    try:
        rows = loadmat(path, squeeze_me=True)["synsets"]
        return {int(row[0]): str(row[1]) for row in rows if int(row[4]) == 0}
    except Exception as error:  # SciPy raises half a dozen kinds for bytes that are no such file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--labels: {path}: cannot be read as the devkit's meta.mat: {reason}; unpack the devkit again"
        ) from error
