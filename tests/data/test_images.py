"""Image batches: decoding of whatever people have, VAR's crop, exact and elastic order."""

from __future__ import annotations

import io
import itertools
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mepa_ds.data.images import ImageBatch, evenly, image_batches, images_once
from mepa_ds.data.options import grouped
from mepa_ds.data.shards.index import MadeBy
from mepa_ds.data.shards.writer import Manifest, ShardWriter
from mepa_ds.distributed import Ranks
from mepa_ds.errors import UserError
from mepa_ds.images.resizing import crop_square, fit_image, resize_shorter
from tests.data.shard_fixtures import CLASSES, encode, make_set, png


def gradient(width: int, height: int) -> Image.Image:
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    return Image.fromarray(ramp.astype(np.uint8))


@given(width=st.integers(1, 70), height=st.integers(1, 70), at=st.floats(0, 0.999))
@settings(deadline=None, max_examples=60)
def test_any_size_fits(width: int, height: int, at: float) -> None:
    assert fit_image(gradient(width, height), 16, (at, at)).size == (16, 16)


def test_a_strip_does_not_grow_to_gigabytes() -> None:
    assert resize_shorter(gradient(20_000, 1), 18).size == (18 * 16, 18)


@pytest.mark.parametrize("size", [(57, 41), (41, 57), (500, 375), (333, 334), (334, 333)])
def test_the_crop_is_that_of_var(size: tuple[int, int]) -> None:
    """Against torchvision's Resize (Lanczos) and CenterCrop."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    image = Image.open(io.BytesIO(png(3, size)))
    expected = Compose([Resize(36, InterpolationMode.LANCZOS), CenterCrop(32)])(image)
    np.testing.assert_array_equal(np.asarray(fit_image(image, 32)), np.asarray(expected))


@pytest.mark.parametrize("side", [256, 288, 67])
def test_sizes_are_those_of_torchvision(side: int) -> None:
    from torchvision.transforms.functional import resize

    sizes = [(side, other) for other in range(side, 2 * side)] + [(n, n + n % 3) for n in range(1, 700)]
    for height, width in sizes:
        expected = resize(Image.new("1", (width, height)), side).size
        assert resize_shorter(Image.new("1", (width, height)), side).size == expected, (width, height)


@pytest.mark.parametrize("side", [32, 36, 67])
def test_white_images_of_every_size_stay_white(side: int) -> None:
    """A crop that reached beyond the image would bring black in."""
    for length in range(1, 400):
        for size in ((length, length), (length, length + 1), (length + 2, length)):
            image = crop_square(resize_shorter(Image.new("L", size, 255), side), side)
            assert image.size == (side, side)
            assert image.getextrema() == (255, 255), size


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    make_set(directory, "images", [9, 0, 14])
    return directory


def take(count: int, images: Path, **options: Any) -> list[ImageBatch]:
    defaults = {"batch_size": 4, "image_side": 8, "seed": 1}
    return list(itertools.islice(image_batches(images, **grouped({**defaults, **options})), count))


def assert_same(first: list[ImageBatch], second: list[ImageBatch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert (a.keys, a.next_position) == (b.keys, b.next_position)
        assert torch.equal(a.pixels_B3HW, b.pixels_B3HW)
        assert torch.equal(a.labels_B, b.labels_B)


def test_batches_hold_what_the_samples_hold(images: Path) -> None:
    for batch in take(6, images):
        assert batch.images_B3HW.shape == (4, 3, 8, 8)
        assert batch.images_B3HW.min() >= -1
        assert batch.images_B3HW.max() <= 1
        assert batch.labels_B.tolist() == [int(key) % 5 for key in batch.keys]
    black_white = ImageBatch(torch.tensor([0, 255], dtype=torch.uint8), torch.zeros(2), ("a", "b"), 0)
    assert black_white.images_B3HW.tolist() == pytest.approx([-1, 1])


def test_workers_change_nothing(images: Path) -> None:
    assert_same(take(9, images, num_workers=2), take(9, images))


def test_an_epoch_sees_each_image_once_and_resumes_anywhere(images: Path) -> None:
    batches = take(23, images)  # 92 images: four epochs of 23
    keys = [key for batch in batches for key in batch.keys]
    for epoch in range(4):
        assert sorted(keys[epoch * 23 : (epoch + 1) * 23]) == [f"{number:09d}" for number in range(23)]
    assert keys[:23] != keys[23:46]
    assert_same(take(5, images, position=batches[10].next_position), batches[11:16])


def test_ranks_share_the_same_stream_with_the_same_crops(images: Path) -> None:
    whole = take(6, images, batch_size=6)
    for world_size in (2, 3):
        ranks = [take(6, images, batch_size=6 // world_size, rank=r, world_size=world_size) for r in range(world_size)]
        for step, batch in enumerate(whole):
            assert torch.equal(torch.cat([rank[step].pixels_B3HW for rank in ranks]), batch.pixels_B3HW)
            assert {rank[step].next_position for rank in ranks} == {batch.next_position}


def test_crops_are_random_and_differ_between_epochs(images: Path) -> None:
    batches = take(60, images, batch_size=23)
    looks = {key: set[bytes]() for key in batches[0].keys}
    for batch in batches:
        for key, pixels in zip(batch.keys, batch.pixels_B3HW, strict=True):
            looks[key].add(pixels.numpy().tobytes())
    assert all(len(seen) > 3 for seen in looks.values())  # 20 x 16 resized to 11 x 9: 4 x 2 crops of 8 x 8


def test_a_pass_sees_each_image_once_over_the_ranks(images: Path) -> None:
    keys: list[str] = []
    for rank in range(3):
        batches = list(images_once(images, batch_size=4, image_side=8, ranks=Ranks(rank, 3)))
        assert [len(batch.keys) for batch in batches][:-1] == [4]
        keys += [key for batch in batches for key in batch.keys]
    assert sorted(keys) == [f"{number:09d}" for number in range(23)]
    ones, others = (list(images_once(images, batch_size=5, image_side=8)) for _ in range(2))
    assert_same(ones, others)


def make_damaged_set(directory: Path) -> Path:
    """23 images, of which number 7 is a text file and number 20 is cut short."""
    made_by = MadeBy(name="test")
    writer = ShardWriter(directory, Manifest(kind="images", shard_names=("shard-000000.tar",), made_by=made_by))
    samples = [[f"{number:09d}", {"jpg": png(number), "cls": b"1"}] for number in range(23)]
    samples[7][1] = {"jpg": b"This is a text file.", "cls": b"1"}
    samples[20][1] = {"jpg": png(20)[:300], "cls": b"1"}
    writer.write_shard("shard-000000.tar", samples)  # type: ignore[arg-type]
    writer.finish()
    return directory


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_stops_and_names_the_sample(tmp_path: Path, num_workers: int) -> None:
    damaged = make_damaged_set(tmp_path)
    with pytest.raises(UserError, match=r"sample '0000000(07|20)': not a readable image") as caught:
        take(6, damaged, num_workers=num_workers)
    assert "Traceback" not in str(caught.value)


def test_skipped_damage_is_replaced_the_same_on_any_world_size(tmp_path: Path) -> None:
    damaged = make_damaged_set(tmp_path)
    whole = take(6, damaged, on_damaged="skip")
    keys = [key for batch in whole for key in batch.keys]
    assert not {"000000007", "000000020"} & set(keys)
    assert len([message for batch in whole for message in batch.damaged]) == 2
    ranks = [take(6, damaged, batch_size=2, rank=r, world_size=2, on_damaged="skip") for r in range(2)]
    for step, batch in enumerate(whole):
        assert ranks[0][step].keys + ranks[1][step].keys == batch.keys


def test_a_set_without_one_whole_image_ends_the_search(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, Manifest(kind="images", shard_names=("a.tar",), made_by=MadeBy(name="test")))
    writer.write_shard("a.tar", [(f"{number}", {"jpg": b"no image", "cls": b"1"}) for number in range(5)])
    writer.finish()
    with pytest.raises(UserError, match=f"{tmp_path}: no sample of the set can be read; make it again"):
        take(1, tmp_path, on_damaged="skip")


def test_shards_that_others_made(tmp_path: Path) -> None:
    """Plain WebDataset shards: no index, jpg and cls, keys of any kind."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            for number in range(5):
                for extension, data in (("JPG", encode(gradient(30, 20), "JPEG")), ("cls", b"3\n")):
                    info = tarfile.TarInfo(f"n0144/{shard}/image_{number}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    batches = list(images_once(tmp_path, batch_size=4, image_side=8))
    assert [key for batch in batches for key in batch.keys][6] == "n0144/1/image_1"
    assert torch.cat([batch.labels_B for batch in batches]).tolist() == [3] * 10


def test_labels_are_optional(tmp_path: Path) -> None:
    manifest = Manifest(kind="images", shard_names=("a.tar",), classes=CLASSES, made_by=MadeBy(name=""))
    writer = ShardWriter(tmp_path, manifest)
    writer.write_shard("a.tar", [("0", {"png": png(0)})])
    writer.finish()
    assert take(1, tmp_path, batch_size=1)[0].labels_B.tolist() == [-1]


def test_bad_settings(images: Path, tmp_path: Path) -> None:
    make_set(tmp_path, "tokens", [2])
    with pytest.raises(UserError, match="no images; give the image set"):
        image_batches(tmp_path, batch_size=2, image_side=8)
    with pytest.raises(UserError, match="no such directory"):
        image_batches(tmp_path / "nowhere", batch_size=2, image_side=8)
    with pytest.raises(UserError, match="seed"):
        image_batches(images, batch_size=2, image_side=8, seed=-1)


def test_a_part_is_spread_evenly() -> None:
    """Also where less than two images of three are dropped."""
    pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2)
    batches = [
        ImageBatch(
            pixels[first : first + 4], torch.arange(10)[first : first + 4], tuple("abcdefghij"[first : first + 4]), 0
        )
        for first in (0, 4, 8)
    ]
    found = list(evenly(iter(batches), 10, 6))
    assert torch.cat([batch.labels_B for batch in found]).tolist() == [0, 2, 4, 5, 7, 9]
    assert "".join(key for batch in found for key in batch.keys) == "acefhj"
    assert all(torch.equal(batch.pixels_B3HW[:, 0, 0, 0], batch.labels_B.byte()) for batch in found)
    assert list(evenly(iter(batches), 10, 10)) == batches
