"""verify_shards finds what is wrong, and repairs what can be made again; show_shards shows it."""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.data.shards.index import INDEX_NAME, MadeBy, ShardIndex, offset_index_path
from mepa_ds.data.shards.writer import Manifest, ShardWriter
from mepa_ds.data_tools.build_shards import BuildOptions, Encoding, build
from mepa_ds.data_tools.precompute import Features, FitTeacher, Tokens
from mepa_ds.data_tools.readers.digits import Digits
from mepa_ds.data_tools.show_shards import Options as ShowOptions
from mepa_ds.data_tools.show_shards import contact_sheet
from mepa_ds.data_tools.verify_shards import Options, verify
from mepa_ds.errors import UserError
from mepa_ds.files import sha256_of_file
from mepa_ds.tokenizer.tokenizer import Tokenizer
from tests.data.shard_fixtures import CLASSES, make_set, png, sample_of

SIZES = (4, 5)


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, ...]:
    kinds = ("images", "tokens", "features")
    for kind in kinds:
        make_set(tmp_path / kind, kind, SIZES)
    return tuple(tmp_path / kind for kind in kinds)


def check(*directories: Path, **changes: Any) -> bool:
    return verify(replace(Options(directories, workers=0), **changes))


def rewrite(directory: Path, samples: list[Any], shard: str = "shard-000001.tar") -> None:
    """Another content of a shard, with an index that fits it."""
    index = ShardIndex.read(directory)
    names = tuple(entry.name for entry in index.shards)
    manifest = Manifest(kind=index.kind, shard_names=names, classes=index.classes, made_by=index.made_by)
    writer = ShardWriter(directory, manifest)
    writer.write_shard(shard, samples)
    writer.finish()


@pytest.mark.processes
def test_whole_sets_pass(sets: tuple[Path, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert check(*sets)
    printed = capsys.readouterr().out
    assert printed.count("no damage found") == 3
    assert "5 classes with 1 to 2 samples, median 2" in printed
    assert check(sets[0], workers=2)


def flip_a_bit(sets: tuple[Path, ...]) -> None:
    path = sets[2] / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)


def cut_short(sets: tuple[Path, ...]) -> None:
    path = sets[1] / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:3000])


def remove(sets: tuple[Path, ...]) -> None:
    (sets[1] / "shard-000000.tar").unlink()


def shift_offsets(sets: tuple[Path, ...]) -> None:
    offset_index_path(sets[1] / "shard-000000.tar").write_bytes(
        offset_index_path(sets[1] / "shard-000001.tar").read_bytes()
    )


def garbled_offsets(sets: tuple[Path, ...]) -> None:
    offset_index = offset_index_path(sets[1] / "shard-000000.tar")
    offset_index.write_bytes(offset_index.read_bytes()[:300])


def other_images(sets: tuple[Path, ...]) -> None:
    for path in sets[1].iterdir():
        path.unlink()
    make_set(sets[1], "tokens", SIZES, images="0123456789abcdef")


def fewer_shards(sets: tuple[Path, ...]) -> None:
    for path in sets[1].iterdir():
        path.unlink()
    make_set(sets[1], "tokens", SIZES[:1])


def other_keys(sets: tuple[Path, ...]) -> None:
    rewrite(sets[1], [sample_of("tokens", number) for number in range(5, 10)])


def other_labels(sets: tuple[Path, ...]) -> None:
    samples = [sample_of("tokens", number) for number in range(4, 9)]
    rewrite(sets[1], [(key, {**members, "cls": b"0"}) for key, members in samples])


def repeated_key(sets: tuple[Path, ...]) -> None:
    rewrite(sets[0], [sample_of("images", number) for number in range(3, 8)])


def no_image(sets: tuple[Path, ...]) -> None:
    samples = [sample_of("images", number) for number in range(4, 8)]
    rewrite(sets[0], [*samples, ("000000008", {"png": b"This is a text file.", "cls": b"3"})])


def label_beyond_classes(sets: tuple[Path, ...]) -> None:
    samples = [sample_of("images", number) for number in range(4, 8)]
    rewrite(sets[0], [*samples, ("000000008", {"png": png(8), "cls": b"77"})])


def code_beyond_codebook(sets: tuple[Path, ...]) -> None:
    index = json.loads((sets[1] / INDEX_NAME).read_text())
    index["made_by"]["settings"]["codebook_size"] = 3
    (sets[1] / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, r"features: .*\n  shard-000001.tar: its SHA-256 differs"),
        (cut_short, r"shard-000000.tar: has 3000 bytes, the index says"),
        (remove, r"shard-000000.tar: is missing"),
        (shift_offsets, r"shard-000000.tar: its stored offsets differ"),
        (garbled_offsets, r"shard-000000.tar: its stored offsets differ"),
        (other_images, r"tokens: .*\n  the set was made from other images than .*images"),
        (fewer_shards, r"tokens: .*\n  the set has 1 shards, .*images has 2"),
        (other_keys, r"tokens: .*\n  shard-000001.tar: its keys are not those of .*images"),
        (other_labels, r"tokens: .*\n  shard-000001.tar: its labels are not those of .*images"),
        (repeated_key, r"key '000000003' is also in shard 0"),
        (no_image, r"shard-000001.tar: sample '000000008': not a readable image"),
        (label_beyond_classes, r"sample '000000008': label 77 is out of range"),
        (code_beyond_codebook, r"sample '000000000': code 3 is outside the codebook of 3"),
    ],
)
def test_damage_is_found_and_named(
    sets: tuple[Path, ...], capsys: pytest.CaptureFixture[str], damage: Any, message: str
) -> None:
    damage(sets)
    assert not check(*sets)
    printed = capsys.readouterr().out
    assert re.search(message, printed), printed


def test_a_failing_disk_is_a_finding(
    sets: tuple[Path, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path) -> str:
        if path.name == "shard-000001.tar":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256_of_file(path)

    monkeypatch.setattr("mepa_ds.data_tools.shard_checks.sha256_of_file", failing)
    assert not check(sets[1])
    assert "shard-000001.tar: cannot be read: Input/output error" in capsys.readouterr().out


def test_copies_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest(kind="images", shard_names=("a.tar",), classes=CLASSES, made_by=MadeBy(name="test"))
    writer = ShardWriter(tmp_path, manifest)
    writer.write_shard("a.tar", [(str(number), {"png": png(number // 2), "cls": b"0"}) for number in range(6)])
    writer.finish()
    assert check(tmp_path)
    printed = capsys.readouterr().out
    assert "3 images are copies of others" in printed
    assert "    0 = 1\n    2 = 3\n    4 = 5\n" in printed
    assert "4 classes without samples: class-1" in printed


@pytest.fixture(scope="module")
def derived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits with real tokens and features, as the quickstart makes them, only fewer."""
    root = tmp_path_factory.mktemp("derived")
    build(Digits("heldout"), BuildOptions(root / "images", Encoding(), shard_samples=100, workers=0))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"channels": 32, "channel_multipliers": (1, 1, 1), "num_res_blocks": 1, "attention": False}
    config = TokenizerConfig(scales=(1, 2, 4, 8), codebook_size=64, code_width=8, **sizes)
    Tokenizer(config).save_pretrained(root / "tokenizer")
    Tokens(root / "images", root / "tokenizer", out=root / "tokens")()
    FitTeacher("patch-pca", root / "images", root / "teacher", grid_side=8, pixels_per_cell=4, window=8, width=8)()
    Features(root / "images", "patch-pca", str(root / "teacher"), out=root / "features")()
    return root


def assert_refused(directories: tuple[Path, ...], message: str, **given: Any) -> None:
    """And nothing was touched before."""
    files = [path for directory in directories for path in directory.iterdir()]
    before = [sha256_of_file(path) for path in files]
    with pytest.raises(UserError, match=message):
        check(*directories, repair=True, **given)
    assert [sha256_of_file(path) for path in files] == before


def test_repair_refuses_a_set_of_other_images(sets: tuple[Path, ...]) -> None:
    other_images(sets)
    cut_short(sets)
    assert_refused(sets, r"--repair: .*tokens: the set was made from other images .* would not mend that")


def test_shards_without_samples_pass(tmp_path: Path) -> None:
    """As a build leaves them whose images were all damaged."""
    for kind in ("images", "tokens"):
        make_set(tmp_path / kind, kind, [3, 0, 2])
    assert check(tmp_path / "images", tmp_path / "tokens")


def test_repair_makes_damaged_shards_again(derived: Path) -> None:
    directories = (derived / "images", derived / "tokens", derived / "features")
    damaged = [derived / "tokens" / "shard-000001.tar", derived / "features" / "shard-000002.tar"]
    digests = [sha256_of_file(path) for path in damaged]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-3000])
    offset_index_path(damaged[0].with_name("shard-000000.tar")).write_bytes(b"")
    assert not check(*directories)
    assert_refused(directories, "--tokenizer", weights=str(derived / "teacher"))
    torch.manual_seed(1)
    Tokenizer(Tokenizer.load(derived / "tokenizer").config).save_pretrained(derived / "other" / "tokenizer")
    given: dict[str, Any] = {"tokenizer": derived / "other" / "tokenizer", "weights": str(derived / "teacher")}
    assert_refused(directories, "holds a set made with other settings .*identity", **given)
    assert_refused(directories, "nowhere", tokenizer=derived / "tokenizer", weights=str(derived / "nowhere"))
    assert check(*directories, repair=True, tokenizer=derived / "tokenizer", weights=str(derived / "teacher"))
    assert [sha256_of_file(path) for path in damaged] == digests


def test_repair_does_not_touch_images(sets: tuple[Path, ...]) -> None:
    (sets[0] / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match="is damaged itself: remove the 1 shards"):
        check(*sets, repair=True)
    cut_short(sets)
    with pytest.raises(UserError, match="give the image set first"):
        check(*sets[1:], repair=True)


def test_contact_sheet(derived: Path) -> None:
    """Image, one column a scale, features; the last reconstruction is the tokenizer's own."""
    show = ShowOptions(
        derived / "images", derived / "tokens", derived / "tokenizer", derived / "features", count=3, side=32
    )
    sheet = contact_sheet(show)
    assert [len(row) for row in sheet.places] == [6, 6, 6]
    tokenizer = Tokenizer.load(derived / "tokenizer")
    tiles = [[sheet.pixels_HW3[top : top + 32, left : left + 32] for top, left in row] for row in sheet.places]
    images = torch.from_numpy(np.stack([row[0] for row in tiles])).permute(0, 3, 1, 2).float() / 127.5 - 1
    rebuilt = tokenizer.decode(tokenizer.encode(images)).add(1).mul(127.5).add(0.5).byte().permute(0, 2, 3, 1)
    for row in range(3):
        assert np.abs(tiles[row][4].astype(int) - rebuilt[row].numpy()).max() <= 1
        assert tiles[row][5].std() > 10
    assert [len(row) for row in contact_sheet(replace(show, tokens=None, features=None)).places] == [1, 1, 1]
    with pytest.raises(UserError, match="--tokenizer: the tokens were made by 'tokenizer'"):
        contact_sheet(replace(show, tokenizer=None))
    with pytest.raises(UserError, match="--count: expected at least 1, got 0"):
        contact_sheet(replace(show, count=0))


def test_sets_that_cannot_be_shown(sets: tuple[Path, ...], tmp_path: Path) -> None:
    make_set(tmp_path / "other", "images", [1])
    label_beyond_classes(sets)
    with pytest.raises(UserError, match="sample '000000008': label 77 is out of range, the set has 5 classes"):
        contact_sheet(ShowOptions(sets[0], count=9, side=8))
    with pytest.raises(UserError, match="holds tokens; give the image set"):
        contact_sheet(ShowOptions(sets[1]))
    index = ShardIndex.read(tmp_path / "other")
    index.model_copy(update={"shards": ()}).write(tmp_path / "other")
    with pytest.raises(UserError, match="the set is empty"):
        contact_sheet(ShowOptions(tmp_path / "other"))
