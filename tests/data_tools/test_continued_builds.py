"""Builds that stopped, and go on by the remedy that they named; and the colour behind transparent images."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mepa_ds.data.shards.index import INDEX_NAME, MadeBy, ShardIndex
from mepa_ds.data.shards.writer import MANIFEST_NAME, Manifest, ShardWriter
from mepa_ds.data_tools.build_shards import Encoding, build
from mepa_ds.data_tools.readers.imagefolder import ImageFolder
from mepa_ds.errors import UserError
from tests.data_tools.build_fixtures import SYNSETS, contents, images_of, make_folder, options, picture


def stopped(root: Path, out: Path) -> None:
    """A build that met damage after its first shards were written."""
    make_folder(root)
    (root / SYNSETS[1] / f"{SYNSETS[1]}_1.JPEG").write_bytes(b"no image")
    with pytest.raises(UserError, match="replace it; or run again with --on-damaged skip, which leaves it out"):
        build(ImageFolder(root), options(out, shard_samples=1))
    assert 0 < len(list(out.glob("shard-*.tar"))) < 12


def test_a_stopped_build_goes_on_with_skip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    stopped(tmp_path / "in", out)
    build(ImageFolder(tmp_path / "in"), options(out, shard_samples=1, on_damaged="skip"))
    assert "of 12 shards are there already" in capsys.readouterr().out
    build(ImageFolder(tmp_path / "in"), options(tmp_path / "other", shard_samples=1, on_damaged="skip"))
    assert contents(out) == contents(tmp_path / "other")
    assert ShardIndex.read(out).made_by.settings["on_damaged"] == "skip"


def test_or_with_the_image_replaced(tmp_path: Path) -> None:
    out, name = tmp_path / "out", f"{SYNSETS[1]}/{SYNSETS[1]}_1.JPEG"
    stopped(tmp_path / "in", out)
    files = make_folder(tmp_path / "whole")
    (tmp_path / "in" / name).write_bytes(files[name])
    build(ImageFolder(tmp_path / "in"), options(out, shard_samples=1))
    build(ImageFolder(tmp_path / "whole"), options(tmp_path / "other", shard_samples=1))
    assert contents(out) == contents(tmp_path / "other")


def test_a_finished_set_without_damage_is_the_same_under_skip(tmp_path: Path) -> None:
    make_folder(tmp_path / "in")
    build(ImageFolder(tmp_path / "in"), options(tmp_path / "out"))
    before = contents(tmp_path / "out")
    assert build(ImageFolder(tmp_path / "in"), options(tmp_path / "out", on_damaged="skip")) is not None
    assert contents(tmp_path / "out") == before


def test_what_was_built_with_skip_is_not_gone_on_with_stop(tmp_path: Path) -> None:
    """Shards that are there may lack images."""
    out = tmp_path / "out"
    stopped(tmp_path / "in", out)
    assert build(ImageFolder(tmp_path / "in"), options(out, shard_samples=1, on_damaged="skip", num_parts=2)) is None
    assert json.loads((out / MANIFEST_NAME).read_text())["made_by"]["settings"]["on_damaged"] == "skip"
    with pytest.raises(UserError, match=r"other settings \(made_by\.settings\.on_damaged 'skip' there, 'stop' now\)"):
        build(ImageFolder(tmp_path / "in"), options(out, shard_samples=1))
    assert not (out / INDEX_NAME).exists()


def transparent(root: Path) -> ImageFolder:
    """One image with a transparent half, and one that is opaque."""
    (root / "c").mkdir(parents=True)
    image = Image.new("RGBA", (8, 8), (0, 0, 255, 255))
    Image.new("RGB", (8, 8), (9, 9, 9)).save(root / "c" / "opaque.png")
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    image.save(root / "c" / "half.png")
    return ImageFolder(root)


@pytest.mark.parametrize("side", [8, None])
def test_the_background_of_transparent_images(tmp_path: Path, side: int | None) -> None:
    """Stored with the image, also where original bytes are kept: their readers would lay them over white."""
    reader, out = transparent(tmp_path / "in"), tmp_path / "black"
    build(reader, options(out, encoding=Encoding(side, "png", background="#102030")))
    found = {np.asarray(Image.open(io.BytesIO(data)))[0, 0].tobytes(): data for data, _ in images_of(out)}
    assert set(found) == {bytes([16, 32, 48]), bytes([9, 9, 9])}
    if side is None:
        assert found[bytes([9, 9, 9])] == (tmp_path / "in" / "c" / "opaque.png").read_bytes()
    assert ShardIndex.read(out).made_by.settings["background"] == "#102030"
    with pytest.raises(UserError, match=r"made_by\.settings\.background '#102030' there, None now"):
        build(reader, options(out, encoding=Encoding(side, "png")))


def test_white_is_no_setting(tmp_path: Path) -> None:
    """Sets that were made before there was one have the same settings."""
    reader = transparent(tmp_path / "in")
    build(reader, options(tmp_path / "plain"))
    build(reader, options(tmp_path / "white", encoding=Encoding(background="#fff")))
    assert contents(tmp_path / "plain") == contents(tmp_path / "white")
    assert "background" not in ShardIndex.read(tmp_path / "plain").made_by.settings
    with pytest.raises(UserError, match="--background: 'whitish' is no colour; give a name such as black"):
        build(reader, options(tmp_path / "other", encoding=Encoding(background="whitish")))


def test_a_plan_of_which_nothing_was_made_stands_in_nobodys_way(tmp_path: Path) -> None:
    """The damaged image is removed: another listing, and so another set."""
    folder, out = tmp_path / "in" / "c", tmp_path / "out"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="not a readable image"):
        build(ImageFolder(folder.parent), options(out))
    assert [path.name for path in out.iterdir()] == [MANIFEST_NAME]
    (folder / "a.jpg").unlink()
    (folder / "b.jpg").write_bytes(picture(1))
    build(ImageFolder(folder.parent), options(out))
    assert images_of(out) == [(picture(1), 0)]


def test_two_builds_that_begin_at_once_do_not_mix(tmp_path: Path) -> None:
    manifests = [
        Manifest(kind="images", shard_names=("a.tar",), made_by=MadeBy(name="x", settings={"seed": seed}))
        for seed in (0, 1)
    ]
    first, second = (ShardWriter(tmp_path, manifest) for manifest in manifests)
    with pytest.raises(UserError, match=r"other settings \(made_by\.settings\.seed 1 there, 0 now\)"):
        first.write_shard("a.tar", [("0", {"cls": b"0"})])
    second.write_shard("a.tar", [("0", {"cls": b"0"})])
    assert second.finish() is not None
