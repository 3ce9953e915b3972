"""Every other reader, and every bad dataset."""

from __future__ import annotations

import errno
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import ShardIndex
from mepa_ds.data_tools.build_shards import build
from mepa_ds.data_tools.merge_index import Scan
from mepa_ds.data_tools.readers.imagefolder import ImageFolder
from mepa_ds.data_tools.readers.imagenet import ImageNet
from mepa_ds.data_tools.readers.parquet import Parquet
from mepa_ds.data_tools.readers.webdataset import WebDataset
from mepa_ds.data_tools.verify_shards import Options as VerifyOptions
from mepa_ds.data_tools.verify_shards import verify
from mepa_ds.errors import UserError
from tests.data.shard_fixtures import make_set, png
from tests.data_tools.build_fixtures import (
    SYNSETS,
    add,
    images_of,
    labelled,
    make_folder,
    options,
    picture,
    write_parquet,
)


def test_any_webdataset(tmp_path: Path) -> None:
    make_set(tmp_path / "in", "images", [5, 6])
    index = build(WebDataset(str(tmp_path / "in")), options(tmp_path / "out"))
    assert index is not None
    assert index.classes == ShardIndex.read(tmp_path / "in").classes  # named there
    assert sorted(images_of(tmp_path / "out")) == sorted(images_of(tmp_path / "in"))
    pattern = f"pipe:cat {tmp_path}/in/shard-{{000000..000001}}.tar"
    remote = build(WebDataset(pattern), options(tmp_path / "remote"))
    assert remote is not None
    assert remote.classes == ("0", "1", "2", "3", "4")
    assert sorted(images_of(tmp_path / "remote")) == sorted(images_of(tmp_path / "in"))
    assert not (tmp_path / "remote" / ".scratch").exists()


def test_a_parquet_export(tmp_path: Path) -> None:
    rows = [(picture(number) if number % 2 else png(number), number % 3) for number in range(11)]
    write_parquet(tmp_path / "in" / "train-0.parquet", rows[:6])
    write_parquet(tmp_path / "in" / "train-1.parquet", rows[6:])
    index = build(Parquet(tmp_path / "in"), options(tmp_path / "out"))
    assert index is not None
    assert index.classes == SYNSETS
    assert sorted(images_of(tmp_path / "out")) == sorted(rows)


def test_hidden_files_of_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parquet(tmp_path / "in" / "train-0.parquet", [(picture(0), 0)])
    (tmp_path / "in" / "._train-0.parquet").write_bytes(b"Mac OS X")
    build(Parquet(tmp_path / "in"), options(tmp_path / "out"))
    assert images_of(tmp_path / "out") == [(picture(0), 0)]
    assert "left out: 1 hidden names, as macOS packs them beside files (._train-0.parquet)" in capsys.readouterr().out


def test_splits_of_an_export_are_not_mixed(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        write_parquet(tmp_path / "in" / name, [(picture(0), 0), (picture(1), 1)])
    with pytest.raises(UserError, match=r"several splits \(test, train\); choose one, such as --pattern 'train-\*"):
        build(Parquet(tmp_path / "in"), options(tmp_path / "out"))
    index = build(Parquet(tmp_path / "in", "test-*.parquet"), options(tmp_path / "out"))
    assert index is not None
    assert index.num_samples == 2


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    """Of notebooks and of macOS's archives: they would shift all labels."""
    files = make_folder(tmp_path / "in")
    for folder in ("__MACOSX/c", ".ipynb_checkpoints", f"{SYNSETS[0]}/.ipynb_checkpoints"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "copy.jpg").write_bytes(picture(1))
    (tmp_path / "in" / SYNSETS[1] / "._1.jpg").write_bytes(b"macOS")
    index = build(ImageFolder(tmp_path / "in"), options(tmp_path / "out"))
    assert index is not None
    assert index.classes == SYNSETS
    assert sorted(images_of(tmp_path / "out")) == sorted(labelled(files))


def test_rows_without_an_image_are_damaged_images(tmp_path: Path) -> None:
    rows = [(picture(0), 0), (None, 1), (picture(2), 2)]
    write_parquet(tmp_path / "in" / "a.parquet", rows)
    with pytest.raises(UserError, match=r"a-000000001\.tiff: not a readable image: .*--on-damaged skip"):
        build(Parquet(tmp_path / "in"), options(tmp_path / "stop"))
    index = build(Parquet(tmp_path / "in"), options(tmp_path / "out", on_damaged="skip"))
    assert index is not None
    assert sorted(images_of(tmp_path / "out")) == sorted(rows[::2])
    assert "a-000000001" in index.shards[0].skipped[0]


@pytest.mark.parametrize(
    "damage",
    [lambda _: b"", lambda data: data[:20], lambda data: data[:-9], lambda data: data[:4] + bytes(999) + data[1003:]],
)
def test_parquet_files_that_are_cut_or_changed(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "in" / "a.parquet"
    write_parquet(path, [(png(number, (60, 60)), 0) for number in range(20)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet: .*; download it again"):
        build(Parquet(tmp_path / "in"), options(tmp_path / "out"))


def test_remote_shards_of_one_name_are_all_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in train/{a,b}/00000.tar; and what a killed build of other URLs left is not taken for them."""
    monkeypatch.setattr("mepa_ds.data.remote.fetching._PAUSE_SECONDS", 0.0)
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        with tarfile.open(tmp_path / str(number) / "shard-000000.tar", "w") as tar:
            add(tar, "x.jpg", picture(number))
            add(tar, "x.cls", str(number).encode())
    out = tmp_path / "out"
    with pytest.raises(UserError, match="cannot be fetched"):
        build(WebDataset(f"pipe:cat {tmp_path}/{{2,missing}}/shard-000000.tar"), options(out))
    assert (out / ".scratch").exists()
    build(WebDataset(f"pipe:cat {tmp_path}/{{0,1}}/shard-000000.tar"), options(out))
    assert sorted(images_of(out)) == [(picture(0), 0), (picture(1), 1)]


def test_members_that_belong_to_no_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Left out and counted as webdataset leaves them out: what macOS packs beside files, a README."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("README", "._x.jpg", "d/._x.jpg", "x.jpg", "x.cls"):
            add(tar, name, b"0" if name == "x.cls" else picture(1) if name == "x.jpg" else b"Mac OS X")
    index = build(WebDataset(str(tmp_path / "a.tar")), options(tmp_path / "out"))
    assert index is not None
    assert images_of(tmp_path / "out") == [(picture(1), 0)]
    note = "2 hidden names, as macOS packs them beside files (._x.jpg, d/._x.jpg); 1 members that are neither"
    assert note in capsys.readouterr().out
    assert ShardSet(tmp_path).read(0) == ("x", {"jpg": picture(1), "cls": b"0"})
    assert note in capsys.readouterr().err
    assert Scan(str(tmp_path), workers=0)().num_samples == 1
    assert note in capsys.readouterr().out
    assert verify(VerifyOptions((tmp_path,), workers=0))


def test_what_a_folder_holds_besides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Left out and counted: other names; links that lead back or to what is listed already."""
    files = make_folder(tmp_path / "in")
    folder = tmp_path / "in" / SYNSETS[0]
    for name in ("x.jfif", "y", "z.JPG_"):
        (folder / name).write_bytes(picture(0))
    (tmp_path / "in" / "stray.jpg").write_bytes(picture(0))
    (folder / "up").symlink_to(tmp_path / "in")
    (folder / "round").symlink_to(folder)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "new.jpg").write_bytes(picture(40))
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "linked twice").symlink_to(tmp_path / "elsewhere")
    build(ImageFolder(tmp_path / "in"), options(tmp_path / "out"))
    assert sorted(images_of(tmp_path / "out")) == sorted([*labelled(files), (picture(40), 0)])
    printed = capsys.readouterr().out
    assert "7 files or folders are left out" in printed
    assert "(stray.jpg, " in printed
    assert all(f"{SYNSETS[0]}/{name}" in printed for name in ("x.jfif", "y", "z.JPG_"))


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "in")
    closed, scandir = str(tmp_path / "in" / SYNSETS[1]), os.scandir

    def refusing(path: Any) -> Any:
        if str(path) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), closed)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=rf"--root: .*{SYNSETS[1]}: cannot be read: Permission denied"):
        ImageFolder(tmp_path / "in").open(None)


def empty_class(root: Path) -> ImageFolder:
    make_folder(root / "in")
    (root / "in" / "n99").mkdir()
    return ImageFolder(root / "in")


def other_archive(root: Path) -> ImageNet:
    with tarfile.open(root / "val.tar", "w") as tar:
        add(tar, "ILSVRC2012_val_00000001.JPEG", picture(0))
    return ImageNet(root / "val.tar")


def wrong_labels(root: Path) -> ImageNet:
    other_archive(root)
    (root / "labels.txt").write_text("n01440764\nn01443537\n")
    return ImageNet(root / "val.tar", root / "labels.txt")


def devkit_without_meta(root: Path) -> ImageNet:
    other_archive(root)
    (root / "labels.txt").write_text("17\n")
    return ImageNet(root / "val.tar", root / "labels.txt")


def repeated_key(root: Path) -> WebDataset:
    with tarfile.open(root / "a.tar", "w") as tar:
        for name in ("x.jpg", "x.cls", "y.jpg", "y.cls", "x.jpg"):
            add(tar, name, b"0" if name.endswith("cls") else picture(0))
    return WebDataset(str(root / "a.tar"))


def unlabelled(root: Path) -> WebDataset:
    with tarfile.open(root / "a.tar", "w") as tar:
        add(tar, "x.jpg", picture(0))
    return WebDataset(str(root / "a.tar"))


def label_beyond_classes(root: Path) -> WebDataset:
    make_set(root / "in", "images", [5])
    (root / "classes.txt").write_text("a\nb\n")
    return WebDataset(str(root / "in"), root / "classes.txt")


def absurd_label(root: Path) -> WebDataset:
    with tarfile.open(root / "a.tar", "w") as tar:
        for key, label in (("x", b"7"), ("y", b"3000000")):
            add(tar, f"{key}.jpg", picture(0))
            add(tar, f"{key}.cls", label)
    return WebDataset(str(root / "a.tar"))


def huge_label(root: Path) -> WebDataset:
    with tarfile.open(root / "a.tar", "w") as tar:
        add(tar, "x.jpg", picture(0))
        add(tar, "x.cls", b"9" * 5000)
    return WebDataset(str(root / "a.tar"))


def classes_are_missing(root: Path) -> WebDataset:
    make_set(root / "in", "images", [5])
    return WebDataset(str(root / "in"), root / "classes.txt")


def evil_path(root: Path) -> WebDataset:
    with tarfile.open(root / "a.tar", "w") as tar:
        add(tar, "../../x.jpg", picture(0))
    return WebDataset(str(root / "a.tar"))


def parquet_without_labels(root: Path) -> Parquet:
    write_parquet(root / "in" / "a.parquet", [(picture(0), -1)])
    return Parquet(root / "in")


def parquet_of_other_columns(root: Path) -> Parquet:
    write_parquet(root / "in" / "a.parquet", [(picture(0), 0)])
    return Parquet(root / "in", image_column="jpg")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty_class, r"1 class folders have no images \(n99\); fill or remove them"),
        (lambda root: ImageFolder(root / "nowhere"), "no such directory"),
        (lambda root: ImageFolder(root), "has no class folders; expected ROOT/CLASS/IMAGE"),
        (other_archive, "holds no class tars .* For validation images give --labels"),
        (lambda root: ImageNet(root / "x.tar"), "no such file"),
        (wrong_labels, "has 2 labels for 1 images"),
        (devkit_without_meta, r"meta\.mat; put it beside them"),
        (repeated_key, r"sample 'x' has two members \.jpg: it comes twice; keys must be unique"),
        (unlabelled, r"sample 'x': has members \['jpg'\]; expected an image and a \.cls label"),
        (label_beyond_classes, "label 2 is out of range, the set has 2 classes"),
        (absurd_label, r"a\.tar: y\.jpg: label 3000000 is far beyond the number of images \(2\)"),
        (huge_label, r"sample 'x': its label b'9+' is no number"),
        (classes_are_missing, r"--classes: .*classes\.txt: cannot be read: No such file"),
        (evil_path, "unsafe path"),
        (lambda root: WebDataset(str(root / "*.tar")), "no tar files there"),
        (parquet_without_labels, "row 0: label -1 is out of range"),
        (parquet_of_other_columns, "has no column 'jpg'"),
        (lambda root: pytest.importorskip("pyarrow") and Parquet(root), "no files"),
    ],
)
def test_bad_datasets_are_refused_before_a_shard_is_written(tmp_path: Path, make: Any, message: str) -> None:
    reader = make(tmp_path)
    with pytest.raises(UserError, match=message):
        build(reader, options(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("shard-*"))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """As tars from Latin-1 systems have them: built from, and named where one is damaged."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for key, data in (("caf\xe9", picture(1)), ("gar\xe7on", b"no image")):
            add(tar, f"{key}.jpg", data)
            add(tar, f"{key}.cls", b"0")
    reader = WebDataset(str(tmp_path / "a.tar"))
    with pytest.raises(UserError, match=r"a\.tar: gar\\udce7on\.jpg: not a readable image"):
        build(reader, options(tmp_path / "stop"))
    index = build(reader, options(tmp_path / "out", on_damaged="skip"))
    assert index is not None
    assert images_of(tmp_path / "out") == [(picture(1), 0)]
    assert "udce7" in index.shards[0].skipped[0]
