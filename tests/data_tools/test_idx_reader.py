"""MNIST's files: read in full, placed in the middle, or refused with a reason."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mepa_ds.data_tools.readers.idx import Idx
from mepa_ds.errors import UserError
from tests.scaling.idx_fixtures import FASHION, write_idx


def files(folder: Path, suffix: str = "") -> Idx:
    pixels = np.arange(3 * 4 * 6, dtype=np.uint8).reshape(3, 4, 6)
    write_idx(folder / f"images{suffix}", pixels)
    write_idx(folder / f"labels{suffix}", np.array([2, 0, 1], np.uint8))
    return Idx(folder / f"images{suffix}", folder / f"labels{suffix}", side=8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_pixels_and_labels_are_those_of_the_files(tmp_path: Path, suffix: str) -> None:
    source = files(tmp_path, suffix).open(None)
    assert len(source) == 3
    assert [source.label(number) for number in range(3)] == [2, 0, 1]
    assert source.classes == ("0", "1", "2")
    extension, content = source.load(1)
    image = np.asarray(Image.open(io.BytesIO(content)))
    assert extension == "png"
    assert image.shape == (8, 8, 3)
    assert (image[2:6, 1:7] == np.arange(24, 48).reshape(4, 6, 1)).all()
    assert image.sum() == 3 * np.arange(24, 48).sum()
    assert source.describe(0) != source.describe(1)


def test_the_first_images_alone(tmp_path: Path) -> None:
    whole = files(tmp_path)
    source = Idx(whole.images, whole.labels, side=8, first=2).open(None)
    assert [source.label(number) for number in range(len(source))] == [2, 0]
    assert source.load(1) == whole.open(None).load(1)
    assert source.settings == {"side": 8, "first": 2}
    for first in (0, 4):
        with pytest.raises(UserError, match=f"--first {first}: .* has 3 images; give 1 to that many"):
            Idx(whole.images, whole.labels, side=8, first=first).open(None)


def test_other_files_are_refused(tmp_path: Path) -> None:
    whole = files(tmp_path)
    with pytest.raises(UserError, match=r"labels: is no IDX file of images \(idx3-ubyte\)"):
        Idx(whole.labels, whole.images).open(None)
    with pytest.raises(UserError, match=r"--side 4: the images of .* are 6 x 4 pixels"):
        Idx(whole.images, whole.labels, side=4).open(None)
    content = whole.images.read_bytes()
    whole.images.write_bytes(content[:-5])
    with pytest.raises(UserError, match="has 67 of the 72 values that it announces"):
        whole.open(None)
    packed = files(tmp_path, ".gz")
    packed.images.write_bytes(packed.images.read_bytes()[:-9])
    with pytest.raises(UserError, match="is no whole gzip file"):
        packed.open(None)
    write_idx(tmp_path / "fewer", np.array([1, 2], np.uint8))
    unequal = Idx(files(tmp_path, ".gz").images, tmp_path / "fewer")
    with pytest.raises(UserError, match=r"images.gz has 3 images, but .*fewer has 2 labels"):
        unequal.open(None)
    with pytest.raises(UserError, match="cannot be read"):
        Idx(tmp_path / "none", whole.labels).open(None)


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_read() -> None:
    source = Idx(FASHION / "t10k-images-idx3-ubyte.gz", FASHION / "t10k-labels-idx1-ubyte.gz").open(None)
    assert (len(source), len(source.classes)) == (10_000, 10)
    assert np.bincount([source.label(number) for number in range(10_000)]).tolist() == [1000] * 10
