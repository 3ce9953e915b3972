"""`mepa evaluate-tokenizer`: its numbers against sums over all images at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mepa_ds.cli.results import evaluate_tokenizer as command
from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.data.images import images_once
from mepa_ds.errors import UserError
from mepa_ds.evaluation.formulas.gaussian import FrechetTo, Gaussian
from mepa_ds.evaluation.tokenizer.reconstruction import psnr
from mepa_ds.evaluation.tokenizer.scores import reconstruction_scales
from mepa_ds.images.pictures import to_uint8
from mepa_ds.teachers.patch_pca import PatchPca, PatchPcaConfig
from mepa_ds.tokenizer.tokenizer import Tokenizer
from tests.train_tokenizer.training_run import make_images
from tests.var_fixtures import TINY_SCALES, fixture_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tokenizer and teacher, and 24 images of 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("scored")
    make_images(folder / "images")
    torch.manual_seed(0)
    sizes = {"channels": 32, "channel_multipliers": (1, 1), "num_res_blocks": 1, "attention": False}
    Tokenizer(
        TokenizerConfig.model_validate({"scales": (1, 2, 4), "codebook_size": 16, "code_width": 4, **sizes})
    ).save_pretrained(folder / "tokenizer")
    teacher = PatchPca(PatchPcaConfig(grid_side=2, pixels_per_cell=4, window=4, width=3))
    teacher.projection.normal_()
    teacher.save(folder / "teacher")
    return folder


def test_scores_are_those_of_all_images_at_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = ["--features", f"patch-pca:{folder / 'teacher'}"]
    for size in ("5", "24"):
        out = tmp_path / size
        command.main(
            [str(folder / "tokenizer"), str(folder / "images"), "--out", str(out), "--batch-size", size, *space]
        )
    parts, whole = (json.loads((tmp_path / size / "scores.json").read_text()) for size in ("5", "24"))
    tokenizer = Tokenizer.load(folder / "tokenizer")
    (batch,) = images_once(folder / "images", batch_size=24, image_side=8)
    images = batch.images_B3HW
    copies = tokenizer.decode(tokenizer.encode(images))
    values = psnr(images, copies)
    for scores in (parts, whole):
        assert scores["psnr"] == pytest.approx(float(values.mean()), rel=1e-6)
        assert scores["psnr_high"] - scores["psnr"] == pytest.approx(1.96 * float(values.std()) / 24**0.5, rel=1e-4)
        assert scores["num_images"] == 24
    assert parts["patch-pca.rfd"] == pytest.approx(whole["patch-pca.rfd"], rel=1e-4)
    teacher = PatchPca.load(folder / "teacher")
    originals, rebuilt = (
        teacher.patch_features(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
        for pixels in (batch.pixels_B3HW.permute(0, 2, 3, 1).numpy(), to_uint8(copies.add(1).div(2)))
    )
    vectors = [torch.cat([cells.mean(1), cells.std(1, correction=0)], 1) for cells in (originals, rebuilt)]
    expected, _ = FrechetTo(Gaussian.of(vectors[0])).distance(vectors[1])
    assert whole["patch-pca.rfd"] == pytest.approx(expected, rel=1e-4)
    assert whole["notes"] == ["ssim: needs images of at least 11 pixels"]
    assert whole["protocol"]["tokenizer"]["identity"] == tokenizer.identity
    said = capsys.readouterr().out
    assert "patch-pca.rfd" in said
    assert "codes in use" in said
    with Image.open(tmp_path / "24" / "reconstructions.png") as sheet:
        assert sheet.width > 4 * 64, "the original and three scales"
        assert sheet.height > 8 * 64


def test_partial_sums_end_in_the_reconstruction(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "tokenizer")
    images = next(images_once(folder / "images", batch_size=3, image_side=8)).images_B3HW
    steps, quality = reconstruction_scales(tokenizer, images)
    copies = tokenizer.decode(tokenizer.encode(images))
    assert np.array_equal(steps[-1], to_uint8(copies.add(1).div(2)))
    assert quality[-1] == pytest.approx(float(psnr(images, copies).mean()))
    assert steps.shape == (3, 3, 8, 8, 3)


def test_vars_tokenizer_is_scored_as_ours(folder: Path, tmp_path: Path) -> None:
    torch.save(fixture_state("tiny_vae"), tmp_path / "vae.pth")
    options = ["--out", str(tmp_path / "out"), "--scales", *map(str, TINY_SCALES), "--max-images", "3"]
    command.main([str(tmp_path / "vae.pth"), str(folder / "images"), *options])
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["num_images"] == 3
    assert scores["protocol"]["tokenizer"]["scales"] == list(TINY_SCALES)
    assert len(scores["perplexity_by_scale"]) == len(TINY_SCALES)


def test_mistakes_are_named_before_the_first_image(folder: Path, tmp_path: Path) -> None:
    words = [str(folder / "tokenizer"), str(folder / "images"), "--out", str(tmp_path / "out")]
    for options, message in [
        (["--max-images", "0"], "--max-images: expected at least 1, got 0"),
        (["--max-images", "1"], "1 images: at least 2 are needed"),
        (["--features", "inception"], "needs --inception FILE"),
        (["--features", "nothing"], "no such feature space"),
        (["--features", *[f"patch-pca:{folder / 'teacher'}"] * 2], "two spaces have the name patch-pca"),
    ]:
        with pytest.raises(UserError, match=message):
            command.main([*words, *options])
    damaged = Tokenizer.load(folder / "tokenizer")
    damaged.quantizer.codebook.weight[:] = torch.nan
    damaged.save_pretrained(tmp_path / "damaged")
    with pytest.raises(UserError, match="image 0 is reconstructed with values that are not finite: the tokenizer's"):
        command.main([str(tmp_path / "damaged"), *words[1:]])
    with pytest.raises(UserError, match=r"images: .*nowhere: no such directory"):
        command.main([words[0], str(tmp_path / "nowhere")])
