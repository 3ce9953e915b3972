"""ImageNet's own archives and every form of labels that people have for them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mepa_ds.data_tools.build_shards import build
from mepa_ds.data_tools.readers.imagefolder import ImageFolder
from mepa_ds.data_tools.readers.imagenet import ImageNet
from mepa_ds.errors import UserError
from tests.data_tools.build_fixtures import (
    SYNSETS,
    add,
    images_of,
    labelled,
    make_folder,
    options,
    picture,
)


def make_imagenet_train(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as outer:
        for synset in reversed(SYNSETS):  # the order of the archive must not matter
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for name, data in files.items():
                    if name.startswith(synset):
                        add(inner, name.split("/")[1], data)
            add(outer, f"{synset}.tar", buffer.getvalue())


def test_two_class_tars_of_one_name_are_refused(tmp_path: Path) -> None:
    make_imagenet_train(tmp_path / "train.tar", make_folder(tmp_path / "in"))
    with tarfile.open(tmp_path / "train.tar", "a") as tar:
        add(tar, f"again/{SYNSETS[1]}.tar", b"")
    with pytest.raises(UserError, match=rf"holds two class tars {SYNSETS[1]}\.tar; remove one of them"):
        ImageNet(tmp_path / "train.tar").open(None)


def test_imagenet_training_archive(tmp_path: Path) -> None:
    files = make_folder(tmp_path / "in")
    make_imagenet_train(tmp_path / "train.tar", files)
    index = build(ImageNet(tmp_path / "train.tar"), options(tmp_path / "out"))
    assert index is not None
    assert index.classes == SYNSETS
    assert sorted(images_of(tmp_path / "out")) == sorted(labelled(files))


def test_what_archives_hold_besides_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted in the outer, the inner and the validation tar: macOS's files, a README; links are followed."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        add(tar, "._n01440764_1.JPEG", b"Mac OS X")
        add(tar, "n01440764_1.JPEG", picture(1))
        add(tar, "list.txt", b"n01440764_1")
        link = tarfile.TarInfo("n01440764_2.JPEG")
        link.type, link.linkname = tarfile.LNKTYPE, "n01440764_1.JPEG"
        tar.addfile(link)
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in ("._n01440764.tar", "README"):
            add(tar, name, b"Mac OS X")
        add(tar, "n01440764.tar", inner.getvalue())
    build(ImageNet(tmp_path / "train.tar"), options(tmp_path / "train"))
    assert images_of(tmp_path / "train") == [(picture(1), 0)] * 2
    printed = capsys.readouterr().out
    assert "2 hidden names, as macOS packs them beside files (._n01440764.tar, ._n01440764_1.JPEG)" in printed
    assert "1 members that are no class tars (README); 1 members that are no images (list.txt)" in printed
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for name in ("._ILSVRC2012_val_00000001.JPEG", "README", "ILSVRC2012_val_00000001.JPEG"):
            add(tar, name, picture(1))
    (tmp_path / "labels.txt").write_text("n01440764\n")
    build(ImageNet(tmp_path / "val.tar", tmp_path / "labels.txt"), options(tmp_path / "val"))
    assert images_of(tmp_path / "val") == [(picture(1), 0)]
    assert "left out: 1 hidden names" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["synsets", "kaggle", "caffe", "csv of numbers", "devkit"])
def test_imagenet_validation_archive(tmp_path: Path, form: str) -> None:
    truth = [2, 0, 1, 1, 2, 0, 0]
    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 8)]
    classes: Path | None = None
    expected_classes: tuple[str, ...] = SYNSETS
    expected_labels = truth
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for number in (3, 0, 6, 1, 5, 2, 4):
            add(tar, f"{names[number]}.JPEG", picture(number))
    labels = tmp_path / "labels.txt"
    if form == "synsets":
        labels.write_text("".join(f"{SYNSETS[label]}\n" for label in truth))
    elif form == "kaggle":
        rows = [f"{name},{SYNSETS[label]} 1 2 3 4 \n" for name, label in zip(names, truth, strict=True)]
        labels.write_text("ImageId,PredictionString\n" + "".join(sorted(rows, reverse=True)))
    elif form in ("caffe", "csv of numbers"):
        places, separator = [12, 10, 2], " " if form == "caffe" else ","
        rows = [f"{name}.JPEG{separator}{places[label]}\n" for name, label in zip(names, truth, strict=True)]
        labels.write_text("".join(rows))
        known = [f"n9999{number:04d}" for number in range(13)]
        for label, synset in enumerate(SYNSETS):
            known[places[label]] = synset
        classes = tmp_path / "synset_words.txt"
        classes.write_text("".join(f"{synset} tench, Tinca tinca\n" for synset in known))
        expected_classes, expected_labels = tuple(known), [places[label] for label in truth]
        with pytest.raises(UserError, match=r"gives class numbers; say what they stand for with --classes"):
            ImageNet(tmp_path / "val.tar", labels).open(None)
    else:
        savemat = pytest.importorskip("scipy.io").savemat
        ids = [3, 1, 2]  # the devkit's own numbering of the three synsets
        labels.write_text("".join(f"{ids[label]}\n" for label in truth))
        fields = [("id", float), ("wnid", object), ("words", object), ("gloss", object), ("children", float)]
        classes_of_devkit = [(ids[label], synset, "w", "g", 0) for label, synset in enumerate(SYNSETS)]
        classes_of_devkit.append((4, "n00001740", "w", "g", 3))
        savemat(tmp_path / "meta.mat", {"synsets": np.array(classes_of_devkit, dtype=fields)})
    index = build(ImageNet(tmp_path / "val.tar", labels, classes), options(tmp_path / "out"))
    assert index is not None
    assert index.classes == expected_classes
    assert sorted(images_of(tmp_path / "out")) == sorted((picture(n), label) for n, label in enumerate(expected_labels))


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (b"n01440764\nx.JPEG\n", None, r"--labels: .* line 2: 'x\.JPEG' is not like the lines before"),
        (b"ILSVRC2012_val_00000001.JPEG tench\n", None, r"line 1: 'ILSVRC2012.* tench' .* neither a synset such as"),
        (b"ILSVRC2012_val_00000001.JPEG 1\nn01440764\n", None, "line 2: 'n01440764' is not like"),
        (b"ILSVRC2012_val_00000001 n01440764\n\nILSVRC2012_val_00000002 4\n", None, "line 3: .* is not like"),
        (b"ILSVRC2012_val_00000001.JPEG 3\n", b"n01440764\nn01443537", "label 3 is out of range, --classes has 2"),
        (b"ILSVRC2012_val_00000001.JPEG 0\n", b"n01440764\ntench", r"--classes: .* line 2: 'tench' is no synset"),
        (b"ILSVRC2012_val_00000001.JPEG 0\n", b"n01440764\nn01440764", r"--classes: .*'n01440764' is there more than"),
        (b"\n", None, "has no labels"),
        (b"n0144\xe90764\n", None, r"--labels: .* is no UTF-8 text: .*; save it as UTF-8"),
    ],
)
def test_label_files_that_are_not_understood(
    tmp_path: Path, labels: bytes, classes: bytes | None, message: str
) -> None:
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        add(tar, "ILSVRC2012_val_00000001.JPEG", picture(0))
    (tmp_path / "labels.txt").write_bytes(labels)
    if classes is not None:
        (tmp_path / "classes.txt").write_bytes(classes)
    with pytest.raises(UserError, match=message):
        ImageNet(tmp_path / "val.tar", tmp_path / "labels.txt", tmp_path / "classes.txt" if classes else None).open(
            None
        )


def test_validation_images_of_some_classes_keep_the_labels_of_all(tmp_path: Path) -> None:
    """A subset without the first class: labels must not move up."""
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for number in (1, 2):
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", picture(number))
    (tmp_path / "lines.txt").write_text(f"{SYNSETS[2]}\n{SYNSETS[1]}\n")
    rows = [f"ILSVRC2012_val_{number + 1:08d},{SYNSETS[label]} 1 2 3 4" for number, label in enumerate([2, 1, 0])]
    (tmp_path / "kaggle.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    (tmp_path / "synsets.txt").write_text("\n".join(SYNSETS))
    make_folder(tmp_path / "in")
    build(ImageFolder(tmp_path / "in"), options(tmp_path / "train"))
    expected = sorted([(picture(1), 2), (picture(2), 1)])
    for number, (labels, classes) in enumerate(
        [("lines.txt", "synsets.txt"), ("lines.txt", "train"), ("kaggle.csv", None)]
    ):
        reader = ImageNet(tmp_path / "val.tar", tmp_path / labels, tmp_path / classes if classes else None)
        index = build(reader, options(tmp_path / f"out{number}"))
        assert index is not None
        assert index.classes == SYNSETS
        assert sorted(images_of(tmp_path / f"out{number}")) == expected
    (tmp_path / "few.txt").write_text(SYNSETS[1])
    with pytest.raises(UserError, match=rf"--classes: .*few.txt: '{SYNSETS[2]}' is not among its 1 classes"):
        ImageNet(tmp_path / "val.tar", tmp_path / "lines.txt", tmp_path / "few.txt").open(None)
    with pytest.raises(UserError, match=r"--classes: .*nowhere: cannot be read: No such file or directory"):
        ImageNet(tmp_path / "val.tar", tmp_path / "lines.txt", tmp_path / "nowhere").open(None)
