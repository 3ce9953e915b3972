"""References of every kind, and what is said of those that cannot be used: before a network is built."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mepa_ds.errors import UserError
from mepa_ds.evaluation import references
from mepa_ds.evaluation.inception import SPATIAL
from mepa_ds.evaluation.references import Reference, ShardImages
from mepa_ds.images.resizing import adm_center_crop
from tests.data.shard_fixtures import make_set
from tests.evaluation.images import digits, labels, write_folder, write_shards

POOL, SPATIAL_WIDTH = 20, 15


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inception's 2048 and 2023 features would take a minute."""
    monkeypatch.setattr(references, "_WIDTHS", {"inception": POOL, SPATIAL: SPATIAL_WIDTH})


def statistics() -> dict[str, NDArray[Any]]:
    return {
        "mu": np.full(POOL, 0.5), "sigma": np.eye(POOL, dtype=np.float32),
        "mu_s": np.full(SPATIAL_WIDTH, 0.25), "sigma_s": np.asfortranarray(2 * np.eye(SPATIAL_WIDTH)),
    }  # fmt: skip


def test_every_kind_gives_the_same_images(tmp_path: Path) -> None:
    """A folder, class folders, an .npz and a shard set."""
    write_folder(tmp_path / "folder", 0, 6)
    for number, (pixels, label) in enumerate(zip(digits(0, 6), labels(0, 6), strict=True)):
        (tmp_path / "classes" / str(label)).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "classes" / str(label) / f"{number}.png")
    np.savez(tmp_path / "images.npz", digits(0, 6), labels(0, 6))
    write_shards(tmp_path / "shards", 0, 6)
    kinds = {"folder": "folder of images", "classes": "folder of images", "images.npz": "images", "shards": "shard set"}
    for name, kind in kinds.items():
        reference = Reference(tmp_path / name)
        assert (reference.kind, reference.statistics) == (kind, {})
        assert reference.images is not None
        assert reference.images.shape == (6, 32, 32, 3)
        np.testing.assert_array_equal(np.concatenate(list(reference.images.batches(4))), digits(0, 6))
        if name != "shards":
            np.testing.assert_array_equal(reference.images.labels, labels(0, 6))  # type: ignore[attr-defined]
        before = reference.fingerprint()
        assert Reference(tmp_path / name).fingerprint() == before
    Image.fromarray(digits(9, 1)[0]).save(tmp_path / "folder/more.png")
    assert Reference(tmp_path / "folder").fingerprint() != Reference(tmp_path / "classes").fingerprint()


def test_statistics_alone_and_beside_images(tmp_path: Path) -> None:
    stored = statistics()
    np.savez(tmp_path / "alone.npz", **stored)  # type: ignore[arg-type]
    reference = Reference(tmp_path / "alone.npz")
    assert (reference.kind, reference.images) == ("statistics alone", None)
    np.testing.assert_array_equal(reference.statistics[SPATIAL].covariance, stored["sigma_s"])
    assert reference.statistics["inception"].covariance.dtype == np.float64
    np.savez(tmp_path / "both.npz", digits(0, 6), mu=stored["mu"], sigma=stored["sigma"])
    reference = Reference(tmp_path / "both.npz")
    assert (reference.kind, list(reference.statistics)) == ("images and statistics", ["inception"])


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    path, stored = tmp_path / "reference.npz", statistics()
    asymmetric, negative = np.eye(POOL), np.eye(SPATIAL_WIDTH)
    asymmetric[3, 5], negative[7, 7] = 0.1, -1
    changes: list[tuple[dict[str, object], str]] = [
        ({"sigma_s": None}, "mu_s is there, but sigma_s is missing; give both"),
        ({"mu": np.zeros((1, POOL))}, r"mu has shape \(1, 20\); expected mu \(20,\) and .* from the images"),
        ({"mu": np.full(POOL, np.nan)}, "mu has values that are not finite"),
        ({"mu": np.zeros(POOL).astype(str)}, "mu is of type <U.*, expected floating-point numbers"),
        ({"mu_s": np.array([None] * SPATIAL_WIDTH)}, "damaged, or not an .npz of plain arrays"),
        ({"sigma": asymmetric}, "sigma is no covariance"),
        ({"sigma_s": negative}, "sigma_s is no covariance"),
        ({"mu@x": np.zeros(0), "sigma@x": np.zeros((0, 0))}, r"mu@x has shape \(0,\)"),
        ({"mu": np.full(POOL, 1e200)}, "mu has values beyond"),
        ({"arr_0": np.zeros((3, 8, 8, 3))}, "arr_0 is float64"),
        ({"arr_0": np.asfortranarray(digits(0, 6))}, "arr_0 is in Fortran order; save numpy.ascontiguousarray"),
        ({"arr_1": np.zeros(4)}, "arr_1 is float64 of shape .* one whole number for each of the 6 images"),
    ]
    for change, message in changes:
        arrays = {"arr_0": digits(0, 6), **stored, **change}
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"reference\.npz: {message}"):
            Reference(path)
    np.savez(path, images=digits(0, 6))
    with pytest.raises(UserError, match=r"neither images \(arr_0.*\) nor statistics \(mu, sigma\) among images"):
        Reference(path)
    np.savez(path, digits(0, 6), **stored)  # type: ignore[arg-type]
    whole = path.read_bytes()
    for place in (2000, len(whole) // 2):  # in the images, in a covariance
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r".* is damaged .*copy or download the file again"):
            Reference(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"damaged, or not an .npz"):
        Reference(path)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UserError, match=r"pipe.npz: cannot read the reference: not a regular file"):
        Reference(tmp_path / "pipe.npz")
    with pytest.raises(UserError, match=r"none.npz: cannot read the reference: No such file"):
        Reference(tmp_path / "none.npz")


def test_a_shard_set_is_cropped_as_adms_references(tmp_path: Path) -> None:
    make_set(tmp_path / "images", "images", [4, 3])
    with pytest.raises(UserError, match="the first image has 20 x 16 pixels; give --image-side"):
        ShardImages(tmp_path / "images")
    images = ShardImages(tmp_path / "images", side=8, most=3)
    assert (len(images), images.num_available, images.shape) == (3, 7, (3, 8, 8, 3))
    (pixels_B883, labels_B) = next(images.labelled_batches(5))
    assert labels_B.tolist() == [0, 3, 1]
    whole = ShardImages(tmp_path / "images", side=16)
    np.testing.assert_array_equal(np.concatenate(list(whole.batches(2)))[0].shape, (16, 16, 3))
    assert pixels_B883.shape == (3, 8, 8, 3)


def test_adms_crop_by_hand() -> None:
    """100 x 70 to 20: halved to 50 x 35, then bicubic to 29 x 20, then the columns 4 to 23."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8))
    halved = image.resize((50, 35), Image.Resampling.BOX).resize((29, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(adm_center_crop(image, 20)), np.asarray(halved)[:, 4:24])
