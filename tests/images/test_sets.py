"""Images to be scored: the pixels that training sees, of all files of a directory, and what is left out is named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mepa_ds.errors import DamagedError, UserError
from mepa_ds.images.decoding import decode_image
from mepa_ds.images.pictures import made_by_of, save_png
from mepa_ds.images.sets import ImageFiles, read_pixels, write_npz


def test_scores_see_what_training_sees(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:, :16, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    Image.fromarray(rgba[..., :3]).save(tmp_path / "colour.png", transparency=(0, 0, 0))
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3)).save(
        tmp_path / "photo.jpg", exif=exif
    )
    names = sorted(tmp_path.iterdir())
    trained = np.stack([np.asarray(decode_image(name.read_bytes(), "")) for name in names])
    assert trained[names.index(tmp_path / "rgba.png"), 0, -1].tolist() == [255, 255, 255]
    np.testing.assert_array_equal(np.concatenate(list(ImageFiles(tmp_path).batches(3))), trained)
    write_npz(tmp_path / "packed.npz", names)
    with np.load(tmp_path / "packed.npz") as packed:
        np.testing.assert_array_equal(packed["arr_0"], trained)


def test_all_image_files_count_and_others_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, suffix in enumerate(("png", "PNG", "jpg", "JPEG", "webp", "bmp", "tif", "gif")):
        Image.new("RGB", (8, 8), (number * 9,) * 3).save(tmp_path / f"{number}.{suffix}")
    assert len(ImageFiles(tmp_path)) == 8
    assert capsys.readouterr().err == ""
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "._0.png").write_bytes(b"macOS")
    (tmp_path / "more.png").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("")
    images = ImageFiles(tmp_path)
    assert len(images) == 8
    said = capsys.readouterr().err
    assert "4 files or folders not named as images are left out (._0.png, caf\\udce9.txt, more.png, notes.txt)" in said
    levels = np.concatenate(list(images.batches(3)))[:, 0, 0, 0]
    assert np.abs(levels - np.arange(8) * 9.0).max() <= 2


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "gone.png").symlink_to("nowhere/a.png")
    os.mkfifo(tmp_path / "pipe.png")
    cases = {
        "cut.png": "not a readable image: .*; replace or remove it",
        "gone.png": "cannot be read: it is a link to nowhere/a.png, which is not there",
        "pipe.png": "cannot be read: not a regular file",
        "none.png": "cannot be read: No such file or directory",
    }
    for name, message in cases.items():
        with pytest.raises(DamagedError, match=rf"{name}: {message}"):
            read_pixels(tmp_path / name)
    with pytest.raises(UserError, match=r"pipe.png: cannot be read: not a regular file; expected a directory of image"):
        ImageFiles(tmp_path / "pipe.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError,
        match="empty: no image files in this directory or in its folders; expected a directory of image files",
    ):
        ImageFiles(tmp_path / "empty")


def test_numbers_that_are_no_classes(tmp_path: Path) -> None:
    """Dates as names of folders and files, and labels that no class has."""
    save_png(np.zeros((4, 4, 3), np.uint8), tmp_path / "days/20240101000000000000/a.png", "us")
    save_png(np.zeros((4, 4, 3), np.uint8), tmp_path / "named/class20240101000000000000_0.png", "us")
    days = ImageFiles(tmp_path / "days")
    assert days.labels is not None
    assert (days.labels.tolist(), days.classes) == ([0], ("20240101000000000000",))
    assert ImageFiles(tmp_path / "named").labels is None
    for label in (-1, 10**12):
        np.savez(tmp_path / "labels.npz", np.zeros((2, 4, 4, 3), np.uint8), np.array([0, label]))
        with pytest.raises(UserError, match="arr_1 has classes from"):
            ImageFiles(tmp_path / "labels.npz")


def test_files_that_do_not_say_who_made_them(tmp_path: Path) -> None:
    save_png(np.zeros((4, 4, 3), np.uint8), tmp_path / "ours.png", "us")
    assert made_by_of(tmp_path / "ours.png") == "us"
    (tmp_path / "cut.png").write_bytes((tmp_path / "ours.png").read_bytes()[:30])
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("no image")
    assert [made_by_of(tmp_path / name) for name in ("cut.png", "photo.jpg", "text.png")] == [None] * 3


def test_archives_that_cannot_be_read(tmp_path: Path) -> None:
    """Whatever byte of them is another."""
    np.savez_compressed(tmp_path / "good.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    data, rng, said = (tmp_path / "good.npz").read_bytes(), np.random.default_rng(0), 0
    for _ in range(100):
        changed = bytearray(data)
        changed[int(rng.integers(len(data)))] = int(rng.integers(256))
        (tmp_path / "changed.npz").write_bytes(changed)
        try:
            assert sum(map(len, ImageFiles(tmp_path / "changed.npz").batches(2))) == 3
        except UserError:
            said += 1
    assert said > 30
