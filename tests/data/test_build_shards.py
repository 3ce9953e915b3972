"""Building image shards: every reader, every bad input, job arrays, and a kill at any moment."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.build_shards import BuildOptions, Encoding, build
from data_tools.readers.digits import Digits
from data_tools.readers.imagefolder import ImageFolder
from data_tools.readers.imagenet import ImageNet
from data_tools.readers.parquet import Parquet
from data_tools.readers.webdataset import WebDataset
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.errors import UserError
from mepa_ds.files import sha256_of_file
from tests.data.shard_fixtures import encode, make_set, png

ROOT = Path(__file__).parents[2]
SYNSETS = ("n01440764", "n01443537", "n02119789")


def options(out: Path, **changes: Any) -> BuildOptions:
    encoding = changes.pop("encoding", Encoding())
    return replace(BuildOptions(out=out, encoding=encoding, shard_samples=4, workers=0), **changes)


def picture(number: int) -> bytes:
    """A JPEG whose mean grey says which it is."""
    return encode(Image.new("RGB", (30 + number % 3, 24), (number * 5,) * 3), "JPEG")


def make_folder(root: Path, per_class: int = 4) -> dict[str, bytes]:
    """ROOT/SYNSET/*.JPEG; returns path -> bytes."""
    files = {}
    for label, synset in enumerate(SYNSETS):
        (root / synset).mkdir(parents=True)
        for number in range(per_class):
            name = f"{synset}/{synset}_{number}.JPEG"
            files[name] = picture(label * per_class + number)
            (root / name).write_bytes(files[name])
    return files


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def contents(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): sha256_of_file(path) for path in directory.rglob("*") if path.is_file()}


def images_of(directory: Path) -> list[tuple[bytes, int]]:
    shards = ShardSet(directory)
    samples = [shards.read(number)[1] for number in range(len(shards))]
    return [(next(data for ext, data in members.items() if ext != "cls"), int(members["cls"])) for members in samples]


def labelled(files: dict[str, bytes]) -> list[tuple[bytes, int]]:
    return [(data, SYNSETS.index(name.split("/")[0])) for name, data in files.items()]


def test_an_image_folder_keeps_its_bytes_and_labels(tmp_path: Path) -> None:
    files = make_folder(tmp_path / "in")
    index = build(ImageFolder(tmp_path / "in"), options(tmp_path / "out"))
    assert index is not None
    assert index.classes == SYNSETS
    assert [shard.num_samples for shard in index.shards] == [4, 4, 4]
    found = images_of(tmp_path / "out")
    assert sorted(found) == sorted(labelled(files))
    assert found != labelled(files)  # shuffled
    assert [ShardSet(tmp_path / "out").key(n) for n in (0, 11)] == ["000000000", "000000011"]


def test_digits(tmp_path: Path) -> None:
    train = build(Digits("train"), options(tmp_path / "train", shard_samples=1000))
    heldout = build(Digits("heldout"), options(tmp_path / "heldout", shard_samples=1000))
    assert train is not None
    assert heldout is not None
    assert (train.num_samples, heldout.num_samples) == (1498, 299)
    counts = Counter(label for _, label in images_of(tmp_path / "heldout"))
    assert set(counts) == set(range(10))
    assert max(counts.values()) - min(counts.values()) <= 2
    image = Image.open(io.BytesIO(images_of(tmp_path / "train")[0][0]))
    assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "PNG")
    assert not {data for data, _ in images_of(tmp_path / "train")} & {d for d, _ in images_of(tmp_path / "heldout")}


def make_imagenet_train(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as outer:
        for synset in reversed(SYNSETS):  # the order of the archive must not matter
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for name, data in files.items():
                    if name.startswith(synset):
                        add(inner, name.split("/")[1], data)
            add(outer, f"{synset}.tar", buffer.getvalue())


def test_imagenet_training_archive(tmp_path: Path) -> None:
    files = make_folder(tmp_path / "in")
    make_imagenet_train(tmp_path / "train.tar", files)
    index = build(ImageNet(tmp_path / "train.tar"), options(tmp_path / "out"))
    assert index is not None
    assert index.classes == SYNSETS
    assert sorted(images_of(tmp_path / "out")) == sorted(labelled(files))


@pytest.mark.parametrize("form", ["synsets", "kaggle", "devkit"])
def test_imagenet_validation_archive(tmp_path: Path, form: str) -> None:
    truth = [2, 0, 1, 1, 2, 0, 0]
    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 8)]
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for number in (3, 0, 6, 1, 5, 2, 4):
            add(tar, f"{names[number]}.JPEG", picture(number))
    labels = tmp_path / "labels.txt"
    if form == "synsets":
        labels.write_text("".join(f"{SYNSETS[label]}\n" for label in truth))
    elif form == "kaggle":
        rows = [f"{name},{SYNSETS[label]} 1 2 3 4 \n" for name, label in zip(names, truth, strict=True)]
        labels.write_text("ImageId,PredictionString\n" + "".join(sorted(rows, reverse=True)))
    else:
        savemat = pytest.importorskip("scipy.io").savemat
        ids = [3, 1, 2]  # the devkit's own numbering of the three synsets
        labels.write_text("".join(f"{ids[label]}\n" for label in truth))
        fields = [("id", float), ("wnid", object), ("words", object), ("gloss", object), ("children", float)]
        rows = [(ids[label], synset, "w", "g", 0) for label, synset in enumerate(SYNSETS)] + [(4, "n00", "w", "g", 3)]
        savemat(tmp_path / "meta.mat", {"synsets": np.array(rows, dtype=fields)})
    index = build(ImageNet(tmp_path / "val.tar", labels), options(tmp_path / "out"))
    assert index is not None
    assert index.classes == SYNSETS
    assert sorted(images_of(tmp_path / "out")) == sorted((picture(n), label) for n, label in enumerate(truth))


def test_any_webdataset(tmp_path: Path) -> None:
    make_set(tmp_path / "in", "images", [5, 6])
    index = build(WebDataset(str(tmp_path / "in")), options(tmp_path / "out"))
    assert index is not None
    assert index.classes == ("0", "1", "2", "3", "4")
    assert sorted(images_of(tmp_path / "out")) == sorted(images_of(tmp_path / "in"))
    pattern = f"pipe:cat {tmp_path}/in/shard-{{000000..000001}}.tar"
    assert build(WebDataset(pattern), options(tmp_path / "remote")) is not None
    assert sorted(images_of(tmp_path / "remote")) == sorted(images_of(tmp_path / "in"))
    assert not (tmp_path / "remote" / ".scratch").exists()


def write_parquet(path: Path, rows: list[tuple[bytes, int]], names: tuple[str, ...] = SYNSETS) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": data, "path": f"{number}.jpg"} for number, (data, _) in enumerate(rows)]
    table = pyarrow.table({"image": images, "label": pyarrow.array([label for _, label in rows], pyarrow.int64())})
    note = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(note)}), path, row_group_size=3)


def test_a_parquet_export(tmp_path: Path) -> None:
    rows = [(picture(number) if number % 2 else png(number), number % 3) for number in range(11)]
    write_parquet(tmp_path / "in" / "train-0.parquet", rows[:6])
    write_parquet(tmp_path / "in" / "train-1.parquet", rows[6:])
    index = build(Parquet(tmp_path / "in"), options(tmp_path / "out"))
    assert index is not None
    assert index.classes == SYNSETS
    assert sorted(images_of(tmp_path / "out")) == sorted(rows)


@pytest.mark.parametrize(
    ("format", "quality", "kind"), [("jpg", 90, "JPEG"), ("png", 95, "PNG"), ("webp", 100, "WEBP")]
)
def test_resize_crop_and_encode_anew(tmp_path: Path, format: Any, quality: int, kind: str) -> None:
    make_folder(tmp_path / "in")
    encoding = Encoding(image_side=16, format=format, quality=quality)
    index = build(ImageFolder(tmp_path / "in"), options(tmp_path / "out", encoding=encoding))
    assert index is not None
    assert index.made_by.settings["image_side"] == 16
    for data, label in images_of(tmp_path / "out"):
        image = Image.open(io.BytesIO(data))
        assert (image.size, image.format) == ((16, 16), kind)
        assert abs(np.asarray(image).mean() / 5 - label * 4 - 1.5) < 2.2  # the picture of its class


def test_shards_of_a_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "c").mkdir(parents=True)
    for number in range(12):
        noise = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)  # 270 kB as PNG
        (tmp_path / "in" / "c" / f"{number}.png").write_bytes(encode(Image.fromarray(noise), "PNG"))
    index = build(ImageFolder(tmp_path / "in"), options(tmp_path / "out", shard_megabytes=1))
    assert index is not None
    assert [shard.num_samples for shard in index.shards] == [3, 3, 3, 3]


def test_job_arrays_and_workers_write_the_same_bytes(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", per_class=7)
    reader = ImageFolder(tmp_path / "in")
    build(reader, options(tmp_path / "whole"))
    for part in (2, 0, 1):
        index = build(reader, options(tmp_path / "parts", num_parts=3, part=part))
        assert (index is None) == (part != 1)
    build(reader, options(tmp_path / "pool", workers=2))
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts") == contents(tmp_path / "pool")
    build(reader, options(tmp_path / "other", shuffle_seed=1))
    assert sorted(images_of(tmp_path / "other")) == sorted(images_of(tmp_path / "whole"))
    assert images_of(tmp_path / "other") != images_of(tmp_path / "whole")


def test_modes_and_sizes_that_people_have(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "c"
    folder.mkdir(parents=True)
    for mode, suffix in (("CMYK", "JPEG"), ("L", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGB", "BMP")):
        Image.new(mode, (20, 30)).save(folder / f"{mode}.{suffix.lower()}", suffix)
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("RGB", (3000, 2)).save(folder / "strip.png")
    kept = build(ImageFolder(tmp_path / "in"), options(tmp_path / "kept"))
    assert kept is not None
    assert kept.num_samples == 8
    assert set(kept.members) == {"jpg", "png", "cls"}  # BMP became PNG
    build(ImageFolder(tmp_path / "in"), options(tmp_path / "cut", encoding=Encoding(8, "png")))
    for data, _ in images_of(tmp_path / "cut"):
        image = Image.open(io.BytesIO(data))
        assert (image.size, image.mode) == ((8, 8), "RGB")


def test_damaged_files_stop_the_build_by_name_or_are_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = make_folder(tmp_path / "in")
    (tmp_path / "in" / SYNSETS[1] / "notes.jpg").write_text("This is a text file.")
    (tmp_path / "in" / SYNSETS[2] / "cut.jpg").write_bytes(picture(3)[:300])
    with pytest.raises(UserError, match=r"(notes|cut)\.jpg: not a readable image: .*--on-damaged skip"):
        build(ImageFolder(tmp_path / "in"), options(tmp_path / "out"))
    with pytest.raises(UserError, match=r"(notes|cut)\.jpg: not a readable image"):
        build(ImageFolder(tmp_path / "in"), options(tmp_path / "pool", workers=2))
    index = build(ImageFolder(tmp_path / "in"), options(tmp_path / "skip", on_damaged="skip"))
    assert index is not None
    assert sorted(images_of(tmp_path / "skip")) == sorted(labelled(files))
    skipped = sorted(message.split(":")[0] for shard in index.shards for message in shard.skipped)
    assert skipped == [f"{SYNSETS[1]}/notes.jpg", f"{SYNSETS[2]}/cut.jpg"]
    assert "2 damaged images left out" in capsys.readouterr().out
    build(ImageFolder(tmp_path / "in"), options(tmp_path / "again", on_damaged="skip"))
    assert contents(tmp_path / "again") == contents(tmp_path / "skip")


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
    (root / "labels.txt").write_text("n01\nn02\n")
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
        (repeated_key, "sample 'x' comes twice; keys must be unique"),
        (unlabelled, r"sample 'x': has members \['jpg'\]; expected an image and a \.cls label"),
        (label_beyond_classes, "label 2 is out of range, the set has 2 classes"),
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


def test_bad_options(tmp_path: Path) -> None:
    make_folder(tmp_path / "in")
    reader = ImageFolder(tmp_path / "in")
    build(reader, options(tmp_path / "out"))
    with pytest.raises(UserError, match="shuffle_seed 0 there, 1 now"):
        build(reader, options(tmp_path / "out", shuffle_seed=1))
    (tmp_path / "in" / SYNSETS[0] / "new.jpg").write_bytes(picture(0))
    with pytest.raises(UserError, match="made with other settings"):  # the dataset changed meanwhile
        build(reader, options(tmp_path / "out"))
    with pytest.raises(UserError, match="run this in one part"):
        build(WebDataset("pipe:cat x.tar"), options(tmp_path / "remote", num_parts=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": Encoding(image_side=0)}, "--image-side: expected at least 1, got 0"),
        ({"encoding": Encoding(image_side=8, quality=1000)}, "--quality: expected 1 to 100, got 1000"),
        ({"shuffle_seed": -1}, "--shuffle-seed: expected at least 0, got -1"),
        ({"shard_megabytes": 0}, "--shard-megabytes: expected at least 1, got 0"),
        ({"shard_samples": 0}, "--shard-samples: expected at least 1, got 0"),
        ({"workers": -1}, "--workers: expected at least 0, got -1"),
        ({"num_parts": 0}, "--num-parts: expected at least 1, got 0"),
        ({"num_parts": 2, "part": 2}, "--part: expected 0 to 1, got 2"),
    ],
)
def test_numbers_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(Digits("heldout"), options(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["parquet", "remote"])
def test_a_finished_build_is_not_copied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "parquet":
        write_parquet(tmp_path / "in" / "a.parquet", [(picture(number), number % 3) for number in range(6)])
        reader: Any = Parquet(tmp_path / "in")
    else:
        make_set(tmp_path / "in", "images", [5, 6])
        reader = WebDataset(f"pipe:cat {tmp_path}/in/shard-{{000000..000001}}.tar")
    first = build(reader, options(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(type(reader), "open", lambda *_: pytest.fail("opened, so copied"))
        assert build(reader, options(tmp_path / "out")) == first
    with pytest.raises(UserError, match="holds a set made with other settings"):
        build(reader, options(tmp_path / "out", shuffle_seed=5))
    if kind == "parquet":  # other files: opened, and refused
        write_parquet(tmp_path / "in" / "a.parquet", [(picture(number), number % 3) for number in range(7)])
        with pytest.raises(UserError, match="holds a set made with other settings"):
            build(reader, options(tmp_path / "out"))
    else:
        (tmp_path / "out" / "shard-000000.tar").unlink()
        assert build(reader, options(tmp_path / "out")) == first  # a missing shard is made again
        assert (tmp_path / "out" / "shard-000000.tar").exists()


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
    with pytest.raises(UserError, match=r"--classes: .*nowhere: no such file or directory"):
        ImageNet(tmp_path / "val.tar", tmp_path / "lines.txt", tmp_path / "nowhere").open(None)


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


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "data_tools" / "build_shards.py"), *arguments]


def test_command_line_errors_are_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        command("imagefolder", "--root", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert result.stderr.strip() == f"error: --root: {tmp_path / 'nowhere'}: no such directory"


def test_killed_tools_leave_complete_shards_and_reruns_end_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 on the whole tool with its workers, as soon as the first shards are there."""
    undisturbed = build(Digits("train"), options(tmp_path / "undisturbed", shard_samples=20))
    assert undisturbed is not None
    whole, out = contents(tmp_path / "undisturbed"), tmp_path / "killed"
    arguments = command("digits", "--shard-samples", "20", "--workers", "2", "--out", str(out))
    running = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.glob("shard-*.tar"))) < 3:
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.005)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    time.sleep(1.5)  # the workers see that their parent is gone
    left = {name: digest for name, digest in contents(out).items() if name.endswith(".tar")}
    assert 3 <= len(left) < len(undisturbed.shards)
    assert all(whole[name] == digest for name, digest in left.items())
    assert build(Digits("train"), options(out, shard_samples=20)) == undisturbed
    assert "are there already" in capsys.readouterr().out
    assert contents(out) == whole
