"""FID and its like against formulas written out, features against the layers they are defined by, and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from mepa_ds.cli.results.evaluate import main
from mepa_ds.errors import UserError
from mepa_ds.evaluation.formulas import SPLIT
from mepa_ds.evaluation.image_scores import (
    Features,
    Gaussian,
    Inception,
    Reference,
    ReferenceFile,
    image_scores,
)
from mepa_ds.images.sets import ImageFiles, write_npz
from tests.evaluation.inception_weights import write_random_weights
from tests.evaluation.test_formulas import naive_precision_and_recall


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_weights(tmp_path_factory.mktemp("inception") / "weights.pth")


def digits(first: int, count: int) -> NDArray[np.uint8]:
    """(count, 32, 32, 3)"""
    pixels = (load_digits().images[first : first + count] * 15.9).astype(np.uint8)
    return np.repeat(pixels.repeat(4, 1).repeat(4, 2)[..., None], 3, axis=3)


def test_features_are_those_of_the_layers(weights: Path) -> None:
    """mixed_6/conv is the first branch of the block Mixed_6d; the spatial features are in TensorFlow's order."""
    inception = Inception(weights, torch.device("cpu"))
    pixels_BHW3 = digits(0, 2)
    features = inception(pixels_BHW3)
    net = inception._network
    x = torch.tensor(pixels_BHW3).permute(0, 3, 1, 2).float()
    x = (interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False) - 128) / 128
    names = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
    names += ["MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"]
    for name in names:
        x = net.get_submodule(name)(x)
    branch_BCHW = net.get_submodule("Mixed_6d.branch1x1")(x)
    assert branch_BCHW.shape[2:] == (17, 17)
    for y, x_, channel in ((0, 0, 0), (3, 11, 6), (16, 16, 5)):
        place = (y * 17 + x_) * 7 + channel
        torch.testing.assert_close(features.spatial_NS[:, place], branch_BCHW[:, channel, y, x_])
    assert features.spatial_NS.shape == (2, 2023)
    assert features.pool_NP.shape == (2, 2048)
    torch.testing.assert_close(features.logits_NK, features.pool_NP @ net.get_parameter("fc.weight").T)


def test_batches_do_not_matter(weights: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", arr_0=digits(0, 5))
    images, inception = ImageFiles(tmp_path / "images.npz"), Inception(weights, torch.device("cpu"))
    done: list[int] = []
    whole, parts = (inception.of_all(images, size, done.append, "images") for size in (5, 2))
    assert done == [5, 2, 2, 1]
    for name in ("pool_NP", "spatial_NS", "logits_NK"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-4, atol=1e-5)


def test_precision_and_recall_are_those_of_loops() -> None:
    torch.manual_seed(0)
    real_NP, samples_NP = torch.randn(30, 6), 0.7 * torch.randn(40, 6) + 0.5
    spatial_NS, logits_NK = torch.randn(40, 3), torch.randn(40, 5)
    reference = Reference(Gaussian.of(real_NP), Gaussian.of(torch.randn(30, 3)), real_NP)
    scores = image_scores(Features(samples_NP, spatial_NS, logits_NK), reference)
    expected = naive_precision_and_recall(samples_NP, real_NP)
    assert 0 < expected[1] < expected[0] < 1
    assert (scores["precision"], scores["recall"]) == pytest.approx(expected)
    assert scores["fid"] == pytest.approx(frechet_of_few(samples_NP, real_NP))


def test_inception_score_is_of_shuffled_splits() -> None:
    """Ten classes that the network is sure of score 10; in the order of the classes the splits hide it."""
    labels_N = torch.arange(10).repeat_interleave(1000)
    logits_NK = 50.0 * torch.nn.functional.one_hot(labels_N, 10)
    few_NP = torch.randn(20, 2)
    reference = Reference(Gaussian.of(few_NP), Gaussian.of(few_NP), few_NP)
    samples = Features(few_NP, few_NP, logits_NK)
    shuffled, as_they_come = (image_scores(samples, reference, order) for order in ("shuffled", "file"))  # type: ignore[arg-type]
    assert shuffled["inception_score"] == pytest.approx(10, rel=1e-3)
    assert as_they_come["inception_score"] == pytest.approx(5, rel=1e-3)
    assert as_they_come["inception_score_std"] == pytest.approx(0, abs=1e-3)
    one_split = image_scores(Features(few_NP, few_NP, logits_NK[:SPLIT]), reference)
    assert one_split["inception_score_std"] is None


def frechet_of_few(first_ND: torch.Tensor, second_MD: torch.Tensor) -> float:
    """With C = A^T A of centred features, tr (C1 C2)^(1/2) is the sum of the singular values of A1 A2^T."""
    first_ND, second_MD = first_ND.double(), second_MD.double()
    rows = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (first_ND, second_MD)]
    traces = sum(float(row.square().sum()) for row in rows)
    cross = float(torch.linalg.svdvals(rows[0] @ rows[1].T).sum())
    return float((first_ND.mean(0) - second_MD.mean(0)).square().sum()) + traces - 2 * cross


def test_the_command(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both forms of image sets."""
    np.savez_compressed(tmp_path / "real.npz", arr_0=digits(0, 12))
    folder = tmp_path / "others"
    folder.mkdir()
    for number, pixels in enumerate(digits(12, 10)):
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    words = ["--reference", str(tmp_path / "real.npz"), "--inception", str(weights)]
    main([str(folder), *words, "--json", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    printed = capsys.readouterr().out
    assert "warning: 10 images; published scores are of 50000" in printed
    assert f"fid                  {scores['fid']:.4f}" in printed
    assert (scores["num_samples"], scores["num_reference"]) == (10, 12)
    inception = Inception(weights, torch.device("cpu"))
    samples, real = inception(digits(12, 10)), inception(digits(0, 12))
    expected = frechet_of_few(samples.pool_NP, real.pool_NP)
    assert scores["fid"] == pytest.approx(expected, rel=1e-3)
    assert (scores["precision"], scores["recall"]) == naive_precision_and_recall(samples.pool_NP, real.pool_NP)
    assert scores["sfid"] > 0


POOL, SPATIAL = 2048, 2023


def stored_statistics() -> dict[str, NDArray[np.float64]]:
    return {
        "mu": np.full(POOL, 0.5), "sigma": np.eye(POOL), "mu_s": np.full(SPATIAL, 0.25), "sigma_s": 2 * np.eye(SPATIAL)
    }  # fmt: skip


def read(path: Path, inception: Inception) -> Reference:
    return ReferenceFile(path).read(inception, 4, lambda _: None)


def test_statistics_in_the_reference_go_before_its_images(weights: Path, tmp_path: Path) -> None:
    path, inception = tmp_path / "reference.npz", Inception(weights, torch.device("cpu"))
    stored = stored_statistics()
    narrow: dict[str, Any] = {name: array.astype(np.float32) for name, array in stored.items()}
    np.savez(path, arr_0=digits(0, 6), **narrow)
    reference = read(path, inception)
    np.testing.assert_array_equal(reference.pool.covariance, stored["sigma"])
    np.testing.assert_array_equal(reference.spatial.mean, stored["mu_s"])
    assert reference.pool_NP.shape == (6, POOL)
    np.savez(path, arr_0=digits(0, 6))
    np.testing.assert_allclose(read(path, inception).pool.mean, reference.pool_NP.double().mean(0), rtol=1e-5)


def test_a_reference_that_cannot_be_used_is_refused_before_the_network_is_built(tmp_path: Path) -> None:
    """Neither Inception's weights nor a sample are looked at."""
    np.savez(tmp_path / "samples.npz", arr_0=digits(0, 6))
    path, real = tmp_path / "reference.npz", digits(0, 6)

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=rf"reference\.npz: {message}"):
            main([str(tmp_path / "samples.npz"), "--reference", str(path), "--inception", str(tmp_path / "nowhere")])

    nan, asymmetric, negative = np.full(POOL, np.nan), np.eye(POOL), np.eye(SPATIAL)
    asymmetric[3, 5], negative[7, 7] = 0.1, -1
    changes: list[tuple[dict[str, object], str]] = [
        ({"sigma_s": None}, r"sigma_s is missing; expected mu \(2048,\) and .* computed from the images"),
        ({"mu": np.zeros((1, POOL))}, r"mu has shape \(1, 2048\)"),
        ({"mu": nan}, "mu has values that are not finite"),
        ({"mu": np.zeros(POOL).astype(str)}, "mu is of type <U.*, expected floating-point numbers"),
        ({"mu_s": np.array([None] * SPATIAL)}, "damaged, or not an .npz of plain arrays"),
        ({"sigma": asymmetric}, "sigma is no covariance"),
        ({"sigma_s": negative}, "sigma_s is no covariance"),
        ({"arr_0": None}, "no arr_0 among mu.npy, .*: precision and recall need the reference's images"),
    ]
    for change, message in changes:
        arrays = {"arr_0": real, **stored_statistics(), **change}
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]
        refused(message)
    stored: dict[str, Any] = {"arr_0": real, **stored_statistics()}
    np.savez(path, **stored)
    whole = path.read_bytes()
    for place in (2000, len(whole) // 2):  # in the images, in a covariance
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        refused(".* is damaged .*copy or download the file again")
    path.write_bytes(whole[: len(whole) // 2])
    refused("damaged, or not an .npz")


def test_features_that_are_not_finite_are_named(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights)
    state["fc.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "broken.pth")
    np.savez(tmp_path / "images.npz", arr_0=digits(0, 6))
    with pytest.raises(UserError, match=r"images\.npz: image 0 has features that are not finite; .*--inception"):
        main(
            [str(tmp_path / "images.npz"), "--reference", str(tmp_path / "images.npz"),
             "--inception", str(tmp_path / "broken.pth")]
        )  # fmt: skip
    few_NP, logits_NK = torch.randn(6, 2), torch.randn(6, 3)
    reference = Reference(Gaussian.of(few_NP), Gaussian.of(few_NP), few_NP)
    broken_NP = few_NP.clone()
    broken_NP[4, 1] = float("inf")
    with pytest.raises(UserError, match="the samples: image 4 has features that are not finite"):
        image_scores(Features(broken_NP, few_NP, logits_NK), reference)
    with pytest.raises(UserError, match="the reference: features of its images are not finite"):
        image_scores(
            Features(few_NP, few_NP, logits_NK), Reference(Gaussian.of(few_NP), Gaussian.of(few_NP), broken_NP)
        )


def test_a_package_that_does_not_do_is_told_first(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_fidelity.version.__version__", "0.3.0")
    with pytest.raises(UserError, match=r"torch-fidelity 0\.3\.0 is installed, but 0\.4 or a newer one is needed: pip"):
        Inception(weights, torch.device("cpu"))
    monkeypatch.setattr("torch_fidelity.version.__version__", "0.4.0-beta")  # of MAR's authors: the same network
    Inception(weights, torch.device("cpu"))
    monkeypatch.delattr("torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3")
    with pytest.raises(UserError, match=r"this needs the package torch-fidelity .*pip install"):
        Inception(weights, torch.device("cpu"))


def test_bad_input(weights: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", arr_0=digits(0, 6))
    np.savez(tmp_path / "small.npz", arr_0=digits(0, 6)[:, ::2, ::2])
    np.savez(tmp_path / "few.npz", arr_0=digits(0, 3))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((6, 32, 32, 3)))
    np.savez(tmp_path / "other.npz", images=digits(0, 6))
    (tmp_path / "text.npz").write_text("no archive")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "wrong.pth")
    good, empty = tmp_path / "good.npz", tmp_path / "empty"
    empty.mkdir()
    cases = {
        (tmp_path / "nowhere.npz", weights): "No such file",
        (tmp_path / "small.npz", weights): r"images of \(16, 16\), but .* has \(32, 32\)",
        (tmp_path / "few.npz", weights): "at least 5 of each are needed",
        (tmp_path / "float.npz", weights): "arr_0 is float64",
        (tmp_path / "other.npz", weights): "no item named 'arr_0.npy'",
        (tmp_path / "text.npz", weights): "not a zip file",
        (empty, weights): "no image files",
        (good, tmp_path / "wrong.pth"): "not the weights of Inception v3",
        (good, tmp_path / "nowhere.pth"): "cannot read the weights",
    }
    for (samples, inception), message in cases.items():
        with pytest.raises(UserError, match=message):
            main([str(samples), "--reference", str(good), "--inception", str(inception)])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", arr_0=digits(0, 6))
    data = bytearray((tmp_path / "good.npz").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "flipped.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"flipped\.npz: arr_0 cannot be read"):
        list(ImageFiles(tmp_path / "flipped.npz").batches(6))


def test_packed_images_are_the_images(tmp_path: Path) -> None:
    pixels = digits(0, 7)
    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    write_npz(tmp_path / "packed.npz", paths[::-1])
    with np.load(tmp_path / "packed.npz") as packed:
        np.testing.assert_array_equal(packed["arr_0"], pixels[::-1])
    np.testing.assert_array_equal(np.concatenate(list(ImageFiles(tmp_path).batches(3))), pixels)
    shutil.copy(paths[0], tmp_path / "other.png")
    Image.fromarray(pixels[0, ::2]).save(tmp_path / "other.png")
    with pytest.raises(UserError, match=r"other\.png: \(16, 32, 3\), but .*0\.png is \(32, 32, 3\)"):
        write_npz(tmp_path / "packed.npz", [paths[0], tmp_path / "other.png"])
