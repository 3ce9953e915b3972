"""Folders as people have them: what is seen, what is said, what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mepa_ds.data_tools import build_shards
from mepa_ds.data_tools.build_shards import BuildOptions, Encoding
from mepa_ds.data_tools.readers import ImageFolder
from mepa_ds.data_tools.readers.source import heldout_mask
from mepa_ds.errors import UserError
from mepa_ds.project.looking.facts import ImageFacts
from mepa_ds.project.looking.places import look


def picture(path: Path, side: int = 20, grey: bool = False) -> None:
    """A square of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(len(path.name)).integers(0, 256, (side, side, 1 if grey else 3), np.uint8)
    Image.fromarray(np.broadcast_to(levels, (side, side, 3)).copy()).save(path)


def folder(root: Path, counts: dict[str, int], side: int = 20, grey: bool = False) -> Path:
    """Class folders with so many images."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture(root / name / f"{number}.png", side, grey)
    return root


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    images = look(str(folder(tmp_path / "own", {"a": 3, "b": 5}, grey=True)))
    assert (images.kind, images.classes, images.counts) == ("folder", ("a", "b"), (3, 5))
    assert (images.side, images.colour, images.num_opened, images.heldout_words) == (20, "grey", 8, ())
    assert images.sizes == {"17-32": 8}
    assert "few" in images.notes[0]


def test_names_of_classes_may_be_anything(tmp_path: Path) -> None:
    names = {"Ankle boot": 2, 'say "it\'s"': 2, "a,b": 2, "Ångström 寿司": 2, "cat": 2, "Cat": 2, "$HOME; #x": 2}
    images = look(str(folder(tmp_path / "own", names)))
    assert set(images.classes) == set(names)
    assert any("differ only in case" in note and "Cat, cat" in note for note in images.notes)


@pytest.mark.parametrize("heldout", ["val", "test", "Validation", "heldout"])
def test_a_split_that_is_there_is_kept(tmp_path: Path, heldout: str) -> None:
    folder(tmp_path / "train", {"a": 3, "b": 3})
    folder(tmp_path / heldout, {"a": 1, "b": 1})
    images = look(str(tmp_path))
    assert (images.num_images, images.train_words[2]) == (6, str(tmp_path / "train"))
    assert images.heldout_words == ("imagefolder", "--root", str(tmp_path / heldout), "--skip-empty")


def test_a_test_split_without_classes_is_not_used(tmp_path: Path) -> None:
    folder(tmp_path / "train", {"a": 3, "b": 3})
    picture(tmp_path / "test/1.png")
    images = look(str(tmp_path))
    assert images.heldout_words == ()
    assert "test is not used" in images.notes[0]


def test_trains_are_things_too(tmp_path: Path) -> None:
    """A class may be called train. What stands beside it tells."""
    for name in ("bus", "car", "train", "test"):
        picture(tmp_path / f"own/{name}/1.png")
    images = look(str(tmp_path / "own"))
    assert images.classes == ("bus", "car", "test", "train")
    assert "train is taken for a class" in images.notes[0]
    folder(tmp_path / "own/train", {"bus": 1, "car": 1})  # with classes in it, it is a split
    assert look(str(tmp_path / "own")).classes == ("bus", "car")


def test_links_that_lead_back_are_not_followed_round_and_round(tmp_path: Path) -> None:
    (tmp_path / "own/a").mkdir(parents=True)
    for name in ("one", "two", "three"):
        (tmp_path / "own/a" / name).symlink_to(tmp_path / "own/a")
    with pytest.raises(UserError, match="no images in it or in its folders"):
        look(str(tmp_path / "own"))


def test_digits_are_not_the_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert look("digits").num_images == 1498
    assert capsys.readouterr().err == ""
    folder(Path("digits"), {"a": 2})
    assert look("digits").num_images == 1498
    assert "for the folder of that name write ./digits" in capsys.readouterr().err
    assert look("./digits").num_images == 2


def test_images_without_class_folders_are_one_class(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / f"holiday/{number}.jpg", side=300)
    images = look(str(tmp_path / "holiday"))
    assert (images.classes, images.num_images, images.train_words[-1]) == (("holiday",), 3, "--flat")
    assert images.notes[0].startswith("there are no class folders: all images are one class")


def test_images_beside_class_folders_and_empty_folders_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "own", {"a": 2, "nothing": 0, "b": 2})
    picture(tmp_path / "own/loose.png")
    images = look(str(tmp_path / "own"))
    assert images.classes == ("a", "b")
    assert "1 images beside the class folders are left out" in images.notes[0]
    assert "1 class folders without images are left out (nothing)" in capsys.readouterr().out


def test_other_sizes_other_colours_and_what_is_no_image(tmp_path: Path) -> None:
    for number, side in enumerate((10, 40, 100, 200, 600)):
        picture(tmp_path / f"own/a/{number}.png", side, grey=number % 2 == 0)
    (tmp_path / "own/a/broken.png").write_bytes(b"\x89PNG nothing more")
    images = look(str(tmp_path / "own"))
    assert images.sides == (10, 100, 600)
    assert images.sizes == {"1-16": 1, "33-64": 1, "65-128": 1, "129-256": 1, "over 512": 1}
    assert images.colour == "mixed"
    assert len(images.unreadable) == 1
    assert any("grey and colour images are mixed, 3 of 5" in note for note in images.notes)
    assert any("1 of the images that were opened cannot be read" in note for note in images.notes)


def test_one_image_a_class(tmp_path: Path) -> None:
    images = look(str(folder(tmp_path / "own", {"a": 1, "b": 1})))
    assert (images.singles, images.counts) == (2, (1, 1))
    assert any("2 of 2 classes have one image" in note for note in images.notes)


def made_set(root: Path, out: Path, side: int) -> None:
    build_shards.build(ImageFolder(root), BuildOptions(out, Encoding(image_side=side, format="png"), workers=0))


@pytest.mark.parametrize(("side", "kind"), [(32, "ready_shards"), (20, "shards")])
def test_shard_sets_of_a_side_that_fits_are_used_where_they_are(tmp_path: Path, side: int, kind: str) -> None:
    root = folder(tmp_path / "own", {"a": 2, "b": 2})
    for split in ("train", "heldout"):
        made_set(root, tmp_path / "sets" / split, side)
    images = look(str(tmp_path / "sets"))
    first = (str(tmp_path / "sets/train"),) if kind == "ready_shards" else ("webdataset", "--shards")
    assert (images.kind, images.train_words[: len(first)], images.num_images) == (kind, first, 4)
    alone = look(str(tmp_path / "sets/train"))
    assert (alone.kind, alone.heldout_words, alone.classes) == ("shards", (), ("a", "b"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "none: no such folder; give a folder of class folders"),
        ("file.png", "file.png: is a file; give a folder"),
        ("empty", "empty: no images in it or in its folders"),
        ("texts", "texts: no images in it or in its folders"),
        ("broken", "broken: none of 2 images can be read: .*a/1.png: not a readable image"),
        ("others", r"others/val: its class folders are not those of .*/train \(b, c in one of them alone\)"),
    ],
)
def test_what_is_no_set_of_images_is_refused(tmp_path: Path, name: str, message: str) -> None:
    picture(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts/a").mkdir(parents=True)
    (tmp_path / "texts/a/readme.txt").write_text("no image")
    (tmp_path / "broken/a").mkdir(parents=True)
    for number in (1, 2):
        (tmp_path / f"broken/a/{number}.png").write_bytes(b"no image")
    folder(tmp_path / "others/train", {"a": 1, "b": 1})
    folder(tmp_path / "others/val", {"a": 1, "c": 1})
    with pytest.raises(UserError, match=message):
        look(str(tmp_path / name))


@pytest.mark.parametrize("seed", range(5))
def test_the_two_halves_are_disjoint_and_all(seed: int) -> None:
    draw = random.Random(seed)
    labels_N = np.array([draw.randrange(12) for _ in range(draw.randrange(1, 400))])
    share = draw.uniform(0.01, 0.99)
    mask_N = heldout_mask(labels_N, share)
    for label in set(labels_N.tolist()):
        mine = mask_N[labels_N == label]
        assert mine.sum() == (0 if len(mine) == 1 else min(max(round(len(mine) * share), 1), len(mine) - 1))
    assert (heldout_mask(labels_N, share) == mask_N).all()


def test_shards_of_the_two_halves_have_every_image_once(tmp_path: Path) -> None:
    root = folder(tmp_path / "own", {"a": 7, "b": 1, "c": 2})
    found: dict[str, list[str]] = {}
    for take in ("train", "heldout"):
        options = BuildOptions(tmp_path / take, Encoding(), hold_out=0.2, take=take, workers=0)  # type: ignore[arg-type]
        maker_source = build_shards.Half(ImageFolder(root).open(None), 0.2, take == "heldout")
        found[take] = [maker_source.describe(number) for number in range(len(maker_source))]
        index = build_shards.build(ImageFolder(root), options)
        assert index is not None
        assert (index.num_samples, index.classes) == (len(found[take]), ("a", "b", "c"))
    assert sorted(found["train"] + found["heldout"]) == sorted(
        f"{name}/{number}.png" for name, count in (("a", 7), ("b", 1), ("c", 2)) for number in range(count)
    )
    assert len(found["heldout"]) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hold_out": 1.0}, "--hold-out: expected a share between 0 and 1, such as 0.1, got 1"),
        ({"take": "heldout"}, "--take heldout: needs --hold-out"),
        ({"hold_out": 0.5, "take": "heldout"}, "every class has one image, so none can be held out"),
    ],
)
def test_wrong_shares_are_refused(tmp_path: Path, given: dict[str, object], message: str) -> None:
    root = folder(tmp_path / "own", {"a": 1, "b": 1})
    with pytest.raises(UserError, match=message):
        build_shards.build(ImageFolder(root), BuildOptions(tmp_path / "out", Encoding(), workers=0, **given))  # type: ignore[arg-type]


def test_a_flat_folder_of_another_split_has_the_same_class(tmp_path: Path) -> None:
    for split in ("train", "val"):
        picture(tmp_path / f"{split}/1.png")
    images: ImageFacts = look(str(tmp_path))
    assert images.heldout_words == ("imagefolder", "--root", str(tmp_path / "val"), "--skip-empty", "--flat")
