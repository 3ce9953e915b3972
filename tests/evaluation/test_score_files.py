"""`mepa evaluate`: the command, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mepa_ds.cli.results.evaluate import main
from mepa_ds.errors import UserError
from mepa_ds.evaluation import classifier, precision_recall
from mepa_ds.evaluation import inception as inception_module
from mepa_ds.evaluation.inception import Inception
from tests.evaluation.formulas.test_gaussian import of_few
from tests.evaluation.images import digits, labels, write_folder, write_pca, write_shards
from tests.evaluation.inception_weights import write_random_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_random_weights(folder / "inception.pth")
    write_pca(folder / "pca")
    write_shards(folder / "train", 0, 60)
    write_folder(folder / "samples", 100, 30)
    np.savez(folder / "real.npz", digits(0, 9))
    return folder


def evaluate(folder: Path, samples: str, reference: str, *words: str) -> dict[str, Any]:
    out = folder / "scores.json"
    main([str(folder / samples), "--reference", str(folder / reference), "--json", str(out), *words])
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def test_by_adms_protocol(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(inception_module, "_CHUNK", {"cpu": 6})
    np.savez(folder / "real.npz", digits(0, 6))
    write_folder(folder / "few", 20, 6, named=False)
    scores = evaluate(folder, "few", "real.npz", "--inception", str(folder / "inception.pth"))
    printed = capsys.readouterr().out
    assert "warning: 6 images; published scores are of 50000" in printed
    assert f"fid                          {scores['fid']:.2e}   ({scores['fid_low']:.2e} to" in printed
    assert "warning: fid: 6 samples are fewer than the covariance of 2048 features needs (2049)" in printed
    inception = Inception(folder / "inception.pth", torch.device("cpu"))
    samples, real = inception(digits(20, 6)), inception(digits(0, 6))
    assert scores["fid"] == pytest.approx(of_few(samples, real), rel=1e-4, abs=1e-12)
    assert (scores["precision"], scores["recall"]) == pytest.approx(precision_recall(real, samples))
    assert scores["sfid"] > 0
    assert (scores["protocol"]["num_samples"], scores["protocol"]["num_reference"]) == (6, 6)


def test_a_reference_made_from_shards_scores_as_they_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a space of one's own, with statistics of all images in the file."""
    space = ["--features", f"patch-pca:{folder / 'pca'}"]
    main(["--make-reference", str(folder / "train"), "--out", str(folder / "made.npz"), *space])
    assert "statistics of 60 images, and 60 of them" in capsys.readouterr().out
    made, direct = (evaluate(folder, "samples", name, *space) for name in ("made.npz", "train"))
    for name in ("patch-pca.fd", "patch-pca.precision", "patch-pca.kid"):
        assert made[name] == pytest.approx(direct[name], rel=1e-6)
    with np.load(folder / "made.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], digits(0, 60))
        np.testing.assert_array_equal(arrays["arr_1"], labels(0, 60))
        alone = {name: arrays[name] for name in arrays.files if "@" in name}
    np.savez(folder / "alone.npz", **alone)  # type: ignore[arg-type]
    statistics = evaluate(folder, "samples", "alone.npz", *space)
    assert statistics["patch-pca.fd"] == made["patch-pca.fd"]
    assert "statistics alone" in statistics["protocol"]["left_out"]["patch-pca.precision"]
    np.savez(folder / "alone.npz", **{**alone, "identity@patch-pca": np.array("other")})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"its statistics of patch-pca .*identity other.* are of other weights"):
        evaluate(folder, "samples", "alone.npz", *space)
    with pytest.raises(UserError, match=r"has statistics of patch-pca and no images, .* nothing to compare inception"):
        evaluate(folder, "samples", "alone.npz", "--inception", str(folder / "inception.pth"))


def test_class_agreement(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(classifier, "_EPOCHS", (1, 1))
    monkeypatch.setattr(classifier, "_BATCH", 16)
    main(["--fit-classifier", str(folder / "train"), "--out", str(folder / "classifier")])
    assert "of 6 held-out images rightly" in capsys.readouterr().out
    words = ["--features", f"classifier:{folder / 'classifier'}", "--classifier", str(folder / "classifier")]
    scores = evaluate(folder, "samples", "train", *words)
    loaded = classifier.Classifier.load(folder / "classifier")
    agrees = (loaded.probs(digits(100, 30)).argmax(1).numpy() == labels(100, 30)).mean()
    assert scores["class_agreement"] == pytest.approx(agrees)
    assert "warning: classes are unbalanced: " in capsys.readouterr().out


def test_class_folders_are_matched_by_name(folder: Path, tmp_path: Path) -> None:
    """A folder that is missing does not move the others to other classes."""
    names = tuple(f"digit {number}" for number in range(10))
    images = (digits(0, 60)[:, ::4, ::4], labels(0, 60))
    fitted = classifier.Classifier.fit(images, images, 10, classes=names)
    fitted.save(tmp_path / "classifier")
    for number, (pixels, label) in enumerate(zip(digits(100, 12), labels(100, 12), strict=True)):
        if label > 2:
            path = tmp_path / f"samples/digit {label}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    words = ["--features", f"patch-pca:{folder / 'pca'}", "--classifier", str(tmp_path / "classifier")]
    asked = labels(100, 12)
    agrees = fitted.probs(digits(100, 12)).argmax(1).numpy()[asked > 2] == asked[asked > 2]
    scores = evaluate(tmp_path, "samples", str(folder / "real.npz"), *words)
    assert scores["class_agreement"] == pytest.approx(agrees.mean())
    assert scores["protocol"]["classes"]["empty"][:3] == [0, 1, 2]
    (tmp_path / "samples/digit 3").rename(tmp_path / "samples/three")
    with pytest.raises(UserError, match="the folders three are none of the classifier's 10 classes"):
        evaluate(tmp_path, "samples", str(folder / "real.npz"), *words)


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "small.npz", digits(0, 6)[:, ::2, ::2])
    np.savez(tmp_path / "few.npz", digits(0, 3))
    np.savez(tmp_path / "float.npz", np.zeros((6, 32, 32, 3)))
    np.savez(tmp_path / "other.npz", images=digits(0, 6))
    (tmp_path / "text.npz").write_text("no archive")
    write_folder(tmp_path / "cut", 0, 6)
    next((tmp_path / "cut").iterdir()).write_bytes(b"")
    Image.new("RGB", (32, 16)).save(tmp_path / "cut/z.png")
    (tmp_path / "empty").mkdir()
    space = ["--features", f"patch-pca:{folder / 'pca'}"]
    for name, message in {
        "nowhere.npz": "No such file",
        "small.npz": r"images of \(16, 16\), but .* has \(32, 32\)",
        "few.npz": "at least 5 of each are needed",
        "float.npz": "arr_0 is float64",
        "other.npz": "no item named 'arr_0.npy'",
        "text.npz": "not a zip file",
        "empty": "no image files",
        str(folder / "train"): "a shard set can be a reference, and is no set of samples",
        "cut": r"class\d+_\d+.png: not a readable image|z.png: \(16, 32, 3\), but",
    }.items():
        with pytest.raises(UserError, match=message):
            main([str(tmp_path / name), "--reference", str(folder / "real.npz"), *space])
    for words, message in (
        ([], "give one of SAMPLES, --make-reference, --fit-classifier; got none"),
        ([str(folder / "samples")], "--reference: give real images"),
        ([str(folder / "samples"), "--reference", "x", "--out", "y"], "belong to --make-reference and"),
        (["--fit-classifier", "x"], "--out: give what --fit-classifier is to write"),
        (["--fit-classifier", "x", "--out", "y", "--image-side", "0"], "--image-side: expected at least 1"),
        (["--make-reference", str(folder / "pca"), "--out", str(tmp_path / "r.npz"), *space], "pca"),
        (["--make-reference", "x", "--out", "y", "--classifier", "z"], "--classifier does not belong to --make-ref"),
        (
            ["--make-reference", "x", "--out", str(tmp_path), *space],
            "--out: .* is a directory; give the name of a file",
        ),
        (["--make-reference", str(folder / "train"), "--out", str(tmp_path / "r"), *space, space[1]], "two spaces"),
        ([str(folder / "samples"), "--reference", "x", "--features"], "--features: name at least one"),
        ([str(folder / "samples"), "--reference", "x", "--json", "/dev/null"], "/dev/null is no regular file"),
    ):
        with pytest.raises(UserError, match=message):
            main(words)


def test_the_decoder_is_that_of_training(folder: Path, tmp_path: Path) -> None:
    """Images that have more bits, transparency or a turn score as what training sees of them: copies."""
    levels = digits(100, 30)[..., 0]
    (tmp_path / "kinds").mkdir()
    for number, level_HW in enumerate(levels):
        path = tmp_path / "kinds" / f"{number:05d}.png"
        if number % 3 == 0:
            Image.fromarray(level_HW.astype(np.uint16) * 257).save(path)
        elif number % 3 == 1:
            alpha_HW4 = np.dstack([level_HW, level_HW, level_HW, np.full_like(level_HW, 255)])
            Image.fromarray(alpha_HW4).save(path)
        else:
            Image.fromarray(level_HW).convert("P").save(path)
    space = ["--features", f"patch-pca:{folder / 'pca'}"]
    found = (evaluate(folder, str(samples), "train", *space) for samples in (tmp_path / "kinds", folder / "samples"))
    first, second = (
        {name: value for name, value in scores.items() if "patch" in name and value is not None} for scores in found
    )
    assert first == pytest.approx(second, rel=1e-6)  # in another order, by their names
