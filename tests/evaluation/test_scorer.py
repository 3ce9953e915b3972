"""Scores of images in memory: against the formulas, whatever the batches and ranks, and the protocol."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mepa_ds.errors import UserError
from mepa_ds.evaluation import (
    Gaussian,
    density_coverage,
    fd_infinity,
    frechet_distance,
    kid,
    precision_recall,
    references,
)
from mepa_ds.evaluation.classifier import Classifier
from mepa_ds.evaluation.feature_spaces import open_feature_space
from mepa_ds.evaluation.measures import Measures, nearest_to_training
from mepa_ds.evaluation.scorer import Scorer, ScorerOptions, gather_features, score_images
from tests.evaluation.images import digits, labels, write_folder, write_pca, write_shards

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards `train` and `heldout`, a reference `real`, a space `pca` and a `classifier`."""
    folder = tmp_path_factory.mktemp("scores")
    write_shards(folder / "train", 0, 60)
    write_shards(folder / "heldout", 300, 40)
    write_folder(folder / "real", 0, 50)
    write_pca(folder / "pca")
    images = (digits(0, 60)[:, ::2, ::2], labels(0, 60))
    Classifier.fit(images, images, 10).save(folder / "classifier")
    return folder


def options(folder: Path, *features: str, **others: Path) -> ScorerOptions:
    return ScorerOptions(features or (f"patch-pca:{folder / 'pca'}",), **others)  # type: ignore[arg-type]


def test_scores_are_the_formulas(folder: Path) -> None:
    asked, pixels = labels(400, 110), digits(400, 110)
    scorer = Scorer.open(folder / "real", options(folder, classifier=folder / "classifier"))
    scores = score_images([pixels[:70], pixels[70:]], asked.tolist(), scorer)
    space = open_feature_space(f"patch-pca:{folder / 'pca'}", CPU)
    mine, real = space(pixels), space(digits(0, 50))
    gaussian, samples = Gaussian.of(real), Gaussian.of(mine)
    expected = {
        "fd": frechet_distance(gaussian.mean, gaussian.covariance, samples.mean, samples.covariance),
        "fd_infinity": fd_infinity(gaussian.mean, gaussian.covariance, mine),
        "kid": kid(real, mine).value,
        **dict(zip(("precision", "recall"), precision_recall(real, mine), strict=True)),
        **dict(zip(("density", "coverage"), density_coverage(real, mine), strict=True)),
    }
    for name, value in expected.items():
        assert scores[f"patch-pca.{name}"] == pytest.approx(value, rel=1e-9), name
        if name != "fd_infinity":
            assert scores[f"patch-pca.{name}_low"] <= value <= scores[f"patch-pca.{name}_high"]
    classifier = Classifier.load(folder / "classifier")
    agrees = float((classifier.probs(pixels).argmax(1).numpy() == asked).mean())
    assert scores["class_agreement"] == pytest.approx(agrees)
    assert scores["classifier_heldout_accuracy"] == classifier.heldout_accuracy
    protocol = json.loads(json.dumps(scores))["protocol"]
    assert (protocol["num_samples"], protocol["num_reference"], protocol["image_side"]) == (110, 50, [32, 32])
    assert protocol["spaces"]["patch-pca"]["identity"] == space.identity
    assert protocol["classes"]["balanced"] is False
    assert protocol["left_out"] == {}
    few = score_images([digits(0, 8)], [0, 0, 1, 1, 3, 3, 4, 4], scorer)["protocol"]["classes"]
    assert few == {"num_classes": 10, "per_class": [2, 2], "empty": [2, 5, 6, 7, 8, 9], "balanced": False}


def test_neither_batches_nor_ranks_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = digits(500, 75)
    scorer = Scorer.open(folder / "real", options(folder, classifier=folder / "classifier"))
    whole = scorer.features(pixels)
    in_parts = scorer.features_of_all(pixels[first : first + 8] for first in range(0, 75, 8))
    ranks = [(scorer.features(pixels[rank::3]), list(range(rank, 75, 3))) for rank in range(3)]
    monkeypatch.setattr("mepa_ds.distributed.of_all", lambda mine: [*(numbers for _, numbers in ranks), []])
    monkeypatch.setattr("mepa_ds.distributed.tensors_of_all", lambda mine: [*(found for found, _ in ranks), {}])
    gathered = gather_features(*ranks[0])
    for name, rows in whole.items():
        assert torch.equal(rows, in_parts[name])
        assert torch.equal(rows, gathered[name])
    assert scorer.score(whole) == scorer.score(gathered)


def test_the_reference_is_computed_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cache = options(folder, cache=tmp_path)
    first = score_images([digits(700, 20)], None, Scorer.open(folder / "real", with_cache))
    (kept,) = tmp_path.glob("patch-pca-*.safetensors")
    before = kept.stat().st_mtime_ns
    assert score_images([digits(700, 20)], None, Scorer.open(folder / "real", with_cache)) == first
    assert kept.stat().st_mtime_ns == before
    kept.write_bytes(b"cut")
    assert score_images([digits(700, 20)], None, Scorer.open(folder / "real", with_cache)) == first
    assert kept.stat().st_size > 1000
    save_file({"something": torch.zeros(50, 2)}, kept)
    assert score_images([digits(700, 20)], None, Scorer.open(folder / "real", with_cache)) == first


def test_copies_of_training_images_are_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(folder, train=folder / "train", heldout=folder / "heldout")
    scorer = Scorer.open(folder / "real", given, 32)
    copies = score_images([digits(0, 30)], None, scorer)
    fresh = score_images([digits(800, 30)], None, scorer)
    assert (copies["memorisation_samples"], copies["memorisation_copies"]) == (0, 1)
    assert copies["memorisation_nearer"] == 1
    assert 0.3 < fresh["memorisation_nearer"] < 0.7
    rows_ND = torch.randn(50, 3)
    with pytest.raises(UserError, match="of different feature spaces"):
        nearest_to_training(rows_ND, rows_ND[:, :2], rows_ND, CPU)
    assert copies["protocol"]["memorisation"]["train"] == {"path": str(folder / "train"), "images": 60, "of": 60}
    monkeypatch.setattr(references.ShardImages.__init__, "__defaults__", (None, 30))
    few = score_images([digits(0, 30)], None, Scorer.open(folder / "real", given, 32))
    assert "samples are compared with 30 of the 60 training images" in few["protocol"]["remarks"][-1]
    with pytest.raises(UserError, match="--train and --heldout: give both"):
        Scorer.open(folder / "real", options(folder, train=folder / "train"))


def test_features_of_ones_own(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "mine.npy", np.asfortranarray(rng.normal(size=(30, 4)).astype(np.float16)))
    np.save(tmp_path / "real.npy", rng.normal(size=(40, 4)).astype(">f8"))
    spec = f"{tmp_path}/mine.npy:{tmp_path}/real.npy"
    scorer = Scorer.open(folder / "real", options(folder, spec))
    scores = score_images([digits(0, 30)], None, scorer)
    samples, real = np.load(tmp_path / "mine.npy"), np.load(tmp_path / "real.npy")
    assert scores["mine.precision"] == precision_recall(real, samples)[0]
    with pytest.raises(UserError, match="mine: features of 30 images, but there are 29 samples"):
        scorer.check_samples(29, None)
    np.save(tmp_path / "few.npy", rng.normal(size=(4, 4)))
    scorer = Scorer.open(folder / "real", options(folder, f"{tmp_path}/mine.npy:{tmp_path}/few.npy"))
    remark = "mine.fd: the 4 images of the reference are fewer than the covariance of 4 features needs (5)"
    assert score_images([digits(0, 30)], None, scorer)["protocol"]["remarks"][0].startswith(remark)
    np.save(tmp_path / "huge.npy", rng.normal(size=(40, 4)) * 1e200)
    scorer = Scorer.open(folder / "real", options(folder, f"{tmp_path}/mine.npy:{tmp_path}/huge.npy"))
    with pytest.raises(UserError, match=r"the reference images have features as large as .*e.200"):
        score_images([digits(0, 30)], None, scorer)
    np.save(tmp_path / "objects.npy", np.array([None] * 3), allow_pickle=True)
    np.save(tmp_path / "narrow.npy", np.zeros((9, 3)))
    np.save(tmp_path / "nan.npy", np.full((9, 4), np.nan))
    for name, message in (
        ("objects", "no .npy file of plain numbers"),
        ("narrow", "4 and 3 features an image; both files must come from the same"),
        ("nan", "image 0 has features that are not finite"),
        ("none", "cannot read the features: No such file"),
    ):
        with pytest.raises(UserError, match=message):
            open_feature_space(f"{tmp_path}/mine.npy:{tmp_path}/{name}.npy", CPU)


def test_what_is_left_out_is_said(folder: Path) -> None:
    """Fewer samples than features, and statistics alone."""
    measures = Measures(0, CPU)
    rows_ND = torch.randn(6, 9)
    from mepa_ds.evaluation.formulas.gaussian import FrechetTo

    measures.add_space("x.{}".format, rows_ND, FrechetTo(Gaussian.of(torch.randn(30, 9))), None)
    assert "x.fd: 6 samples are fewer than the covariance of 9 features needs (10)" in measures.remarks[0]
    assert measures.left_out["x.precision"] == "the reference has statistics alone, and this needs its images"
    assert measures.left_out["x.fd_infinity"] == "needs 72 samples, there are 6"
    assert measures.scores["x.precision"] is None


def test_bad_input(folder: Path) -> None:
    scorer = Scorer.open(folder / "real", options(folder, classifier=folder / "classifier"))
    features = scorer.features(digits(0, 9))
    broken = {**features, "patch-pca": features["patch-pca"] * float("inf")}
    for found, asked, message in (
        (features, [0] * 8, "8 labels for 9 samples"),
        (features, [0] * 8 + [10], r"labels from 0 to 10, but the classifier knows classes 0\.\.9"),
        (broken, None, "samples: image 0 has features that are not finite"),
    ):
        with pytest.raises(UserError, match=message):
            scorer.score(found, asked)
    with pytest.raises(UserError, match="two spaces have the name patch-pca"):
        Scorer.open(folder / "real", options(folder, *[f"patch-pca:{folder / 'pca'}"] * 2))
    for spec, message in (
        ("dino", "--features dino: no such feature space; expected inception, teacher:NAME"),
        ("inception", "needs --inception FILE"),
        ("a.npy", "give two files, SAMPLES.npy:REFERENCE.npy"),
        ("patch-pca:~nobody_at_all/x", "no home directory of ~nobody_at_all"),
        ("teacher:dinov2-l", "teacher 'dinov2-l' needs weights"),
        ("teacher:dino9:x", "teacher 'dino9' is unknown"),
    ):
        with pytest.raises(UserError, match=message):
            open_feature_space(spec, CPU)
    with pytest.raises(UserError, match="there are no images to score"):
        score_images([], None, scorer)
