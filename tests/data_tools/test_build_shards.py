"""Building image shards: options, damaged images, job arrays, and a kill at any moment."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.views import Views
from mepa_ds.data_tools.build_shards import Encoding, build
from mepa_ds.data_tools.readers.digits import Digits
from mepa_ds.data_tools.readers.imagefolder import ImageFolder
from mepa_ds.data_tools.readers.parquet import Parquet
from mepa_ds.data_tools.readers.webdataset import WebDataset
from mepa_ds.errors import UserError
from tests.data.shard_fixtures import encode, make_set
from tests.data_tools.build_fixtures import (
    SYNSETS,
    contents,
    images_of,
    labelled,
    make_folder,
    options,
    picture,
    write_parquet,
)

ROOT = Path(__file__).parents[2]


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


@pytest.mark.processes
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


def test_whole_images_give_the_crops_of_the_originals(tmp_path: Path) -> None:
    """Centre squares would keep random crops from the ends of oblong images."""
    (tmp_path / "in" / "c").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "in" / "c" / "a.png")
    build(ImageFolder(tmp_path / "in"), options(tmp_path / "kept"))
    whole = build(ImageFolder(tmp_path / "in"), options(tmp_path / "whole", encoding=Encoding(36, "png", crop="none")))
    assert whole is not None
    assert (whole.made_by.settings["image_side"], whole.made_by.settings["crop"]) == (36, "none")
    crops = []
    for name in ("kept", "whole"):
        ((data, _),) = images_of(tmp_path / name)
        crops.append(Views(32, 8).crop(Image.open(io.BytesIO(data)), "key"))
    assert Image.open(io.BytesIO(data)).size == (60, 36)
    np.testing.assert_array_equal(crops[0][0], crops[1][0])
    np.testing.assert_array_equal(crops[0][1], crops[1][1])
    with pytest.raises(UserError, match="--crop none: is for resized images"):
        build(ImageFolder(tmp_path / "in"), options(tmp_path / "x", encoding=Encoding(crop="none")))


def test_photos_are_upright(tmp_path: Path) -> None:
    """A camera that is held sideways notes it in EXIF."""
    (tmp_path / "in" / "c").mkdir(parents=True)
    upright = Image.new("L", (20, 40))
    upright.paste(255, (0, 0, 20, 20))  # white above
    exif = Image.Exif()
    exif[274] = 6  # orientation: turn by 90 degrees to the right
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "in" / "c" / "a.jpg", exif=exif, quality=100)
    build(ImageFolder(tmp_path / "in"), options(tmp_path / "out", encoding=Encoding(16, "png", crop="none")))
    ((data, _),) = images_of(tmp_path / "out")
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert pixels.shape == (32, 16, 3)
    assert pixels[:12].min() > 200
    assert pixels[20:].max() < 50


@pytest.mark.processes
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


def test_a_set_without_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in" / "c").mkdir(parents=True)
    for number in range(6):
        (tmp_path / "in" / "c" / f"{number}.jpg").write_text("This is a text file.")
    reader, out = ImageFolder(tmp_path / "in"), tmp_path / "out"
    assert build(reader, options(out, on_damaged="skip", num_parts=2)) is None
    with pytest.raises(UserError, match=r"the set would be empty: 6 samples were left out as damaged \(c/.*jpg: not a"):
        build(reader, options(out, on_damaged="skip", num_parts=2, part=1))
    assert not (out / "index.json").exists()


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
    (tmp_path / "out" / ".scratch").mkdir()  # as when it was killed after its last step but one
    with monkeypatch.context() as patch:
        patch.setattr(type(reader), "open", lambda *_: pytest.fail("opened, so copied"))
        assert build(reader, options(tmp_path / "out")) == first
    assert not (tmp_path / "out" / ".scratch").exists()
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


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "data_tools" / "build_shards.py"), *arguments]


@pytest.mark.processes
def test_command_line_errors_are_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        command("imagefolder", "--root", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert result.stderr.strip() == f"error: --root: {tmp_path / 'nowhere'}: no such directory"


KILLED = """
import multiprocessing, os, signal, sys
from mepa_ds.data_tools import build_shards

every = build_shards.unordered_map

def three(*arguments):
    for number, written in enumerate(every(*arguments), start=1):
        yield written
        if number == 3:
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

build_shards.unordered_map = three
build_shards.main()
"""


@pytest.mark.processes
def test_killed_tools_leave_complete_shards_and_reruns_end_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 on the tool when the third shard is there; its workers may write another one each."""
    undisturbed = build(Digits("train"), options(tmp_path / "undisturbed", shard_samples=20))
    assert undisturbed is not None
    whole, out = contents(tmp_path / "undisturbed"), tmp_path / "killed"
    arguments = command("digits", "--shard-samples", "20", "--workers", "2", "--out", str(out))
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments[2:]], capture_output=True, text=True, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for worker in killed.stdout.split():  # they see that their parent is gone
        while Path(f"/proc/{worker}").exists() and " (zombie)" not in Path(f"/proc/{worker}/status").read_text():
            time.sleep(0.05)
    left = {name: digest for name, digest in contents(out).items() if name.endswith(".tar")}
    assert 3 <= len(left) < len(undisturbed.shards)
    assert all(whole[name] == digest for name, digest in left.items())
    assert build(Digits("train"), options(out, shard_samples=20)) == undisturbed
    assert "are there already" in capsys.readouterr().out
    assert contents(out) == whole
