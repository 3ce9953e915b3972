"""ImageNet's own archives: the training tar of 1000 class tars, and the validation tar with its labels."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_tools.readers.tar_members import TarMembers
from mepa_ds.data.index import ShardIndex
from mepa_ds.data.tar import iterate_members, iterate_members_within
from mepa_ds.errors import UserError


@dataclass(frozen=True)
class ImageNet:
    """ILSVRC2012_img_train.tar, or ILSVRC2012_img_val.tar with --labels."""

    tar: Path
    """The archive as downloaded: it is read in place, nothing is unpacked."""
    labels: Path | None = None
    """Of the validation images, either a synset a line in the order of the file names, or LOC_val_solution.csv, or the
    devkit's ILSVRC2012_validation_ground_truth.txt with meta.mat beside it."""
    classes: Path | None = None
    """For validation images of some classes only: text file of all synsets, one a line in the order of the labels, or
    the shard set of the training images. By default the classes are those that the labels name."""

    def open(self, scratch: Path | None) -> TarMembers:
        if not self.tar.is_file():
            raise UserError(f"--tar: {self.tar}: no such file")
        if self.labels is None:
            return _open_train(self.tar)
        if not self.labels.is_file():
            raise UserError(f"--labels: {self.labels}: no such file")
        return _open_val(self.tar, self.labels, self.classes)


def _open_train(path: Path) -> TarMembers:
    inner = {name.rpartition("/")[2][: -len(".tar")]: place for name, *place in _members(path) if name.endswith(".tar")}
    if not inner:
        raise UserError(
            f"--tar: {path}: holds no class tars such as n01440764.tar; is it the training archive? "
            "For validation images give --labels"
        )
    source = TarMembers("imagenet", tuple(sorted(inner)), paths=[path])
    for label, synset in enumerate(tqdm(source.classes, "listing", unit="class")):
        offset, size = inner[synset]
        found = len(source)
        for name, start, length in iterate_members_within(path, offset, size):
            source.add(0, name, start, length, label)
        if len(source) == found:
            raise UserError(f"--tar: {path}: the class tar {synset}.tar is empty; download the archive again")
    return source


def _open_val(path: Path, labels: Path, class_list: Path | None) -> TarMembers:
    members = sorted(_members(path))
    names = [name.rpartition("/")[2].partition(".")[0] for name, _, _ in members]
    synsets, known = _read_labels(labels, names)
    classes = known if class_list is None else _read_classes(class_list)
    if unknown := set(synsets) - set(classes):
        raise UserError(f"--classes: {class_list}: {min(unknown)!r} is not among its {len(classes)} classes")
    source = TarMembers("imagenet", classes, paths=[path])
    label_of = {synset: label for label, synset in enumerate(classes)}
    for (name, offset, size), synset in zip(members, synsets, strict=True):
        source.add(0, name, offset, size, label_of[synset])
    return source


def _members(path: Path) -> list[tuple[str, int, int]]:
    return list(iterate_members(path))


def _read_classes(path: Path) -> tuple[str, ...]:
    if path.is_dir():
        return ShardIndex.read(path, "--classes").classes
    if not path.is_file():
        raise UserError(f"--classes: {path}: no such file or directory")
    return tuple(path.read_text().split())


def _read_labels(path: Path, names: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The synset of each image, in order; and all synsets that the labels know, in alphabetical order."""
    rows = [row for row in csv.reader(path.read_text().splitlines()) if row]
    if rows and len(rows[0]) == 2:  # LOC_val_solution.csv: name, "synset x y x y ..."
        by_name = {
            row[0].partition(".")[0]: row[1].split()[0] for row in rows if row[1].split() and row[0] != "ImageId"
        }
        missing = [name for name in names if name not in by_name]
        if missing:
            raise UserError(f"--labels: {path}: {len(missing)} images have no label there, {missing[0]!r} among them")
        return [by_name[name] for name in names], tuple(sorted(set(by_name.values())))
    values = [row[0].strip() for row in rows]
    if len(values) != len(names):
        raise UserError(f"--labels: {path}: has {len(values)} labels for {len(names)} images; is it the right file?")
    if not all(value.isdigit() for value in values):
        return values, tuple(sorted(set(values)))
    synsets = _synsets_of_devkit(path.with_name("meta.mat"))
    unknown = sorted({value for value in values if int(value) not in synsets})
    if unknown:
        raise UserError(f"--labels: {path}: label {unknown[0]} is out of range, meta.mat has {len(synsets)} classes")
    return [synsets[int(value)] for value in values], tuple(sorted(synsets.values()))


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
    rows = loadmat(path, squeeze_me=True)["synsets"]
    return {int(row[0]): str(row[1]) for row in rows if int(row[4]) == 0}
