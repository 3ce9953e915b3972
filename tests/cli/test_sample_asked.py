"""`mepa sample` with settings by scale, no class, mixed classes, and given images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mepa_ds.cli import sample as command
from mepa_ds.errors import UserError
from mepa_ds.generation.editing import Given, keep_outside, keep_scales
from mepa_ds.generation.sampling import sample
from mepa_ds.images.pictures import made_by_of, to_uint8
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer import Tokenizer
from tests.var_fixtures import TINY_SCALES, fixture_state

SIDE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    NextScaleTransformer.from_var(fixture_state("tiny_var_adaln"), scales=TINY_SCALES).save_pretrained(folder / "model")
    Tokenizer.from_var(fixture_state("tiny_vae"), scales=TINY_SCALES).save_pretrained(folder / "tokenizer")
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[16:48, 16:48] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def drawn(folder: Path, out: Path, *options: str) -> np.ndarray[Any, Any]:
    """The images of a directory, in order."""
    paths = ["--weights", str(folder / "model"), "--tokenizer", str(folder / "tokenizer"), "--out", str(out)]
    command.main([*paths, *options])
    return np.stack([np.asarray(Image.open(path)) for path in sorted(out.iterdir())])


def expected(folder: Path, labels: list[Any], **options: Any) -> np.ndarray[Any, Any]:
    model, tokenizer = NextScaleTransformer.load(folder / "model"), Tokenizer.load(folder / "tokenizer")
    return to_uint8(sample(model, tokenizer, labels, **options))


@pytest.mark.parametrize(
    ("words", "labels", "options"),
    [
        (["--classes", "none", "--per-class", "2"], [None, None], {}),
        (["--classes", "3", "--cfg", "0", "1", "2", "3"], [3], {"cfg": [0, 1, 2, 3]}),
        (["--classes", "3", "--cfg-schedule", "constant"], [3], {"cfg_schedule": "constant"}),
        (["--classes", "3", "--guided-scales", "2", "3"], [3], {"guided_scales": (2, 3)}),
        (["--classes", "3", "--temperature", "0.5"], [3], {"temperature": 0.5}),
        (["--classes", "3", "--top-k", "1", "2", "3", "4"], [3], {"top_k": [1, 2, 3, 4]}),
        (["--classes", "3", "--negative", "5"], [3], {"negative": [5]}),
        (["--classes", "3", "--towards", "5", "--share", "0.25"], [3], {"towards": [5], "share": 0.25}),
    ],
)
def test_options_are_the_samplers(
    folder: Path, tmp_path: Path, words: list[str], labels: list[Any], options: dict[str, Any]
) -> None:
    if "--per-class" not in words:
        words = [*words, "--per-class", "1"]
    assert np.array_equal(drawn(folder, tmp_path / "images", *words), expected(folder, labels, **options))


@pytest.mark.parametrize("kind", ["repaint", "vary"])
def test_given_images(folder: Path, tmp_path: Path, kind: str) -> None:
    model, tokenizer = NextScaleTransformer.load(folder / "model"), Tokenizer.load(folder / "tokenizer")
    pixels = torch.from_numpy(np.array(Image.open(folder / "photo.png"))).permute(2, 0, 1)[None].float()
    tokens = tokenizer.encode(pixels / 127.5 - 1)
    if kind == "repaint":
        words = ["--repaint", str(folder / "mask.png")]
        keep = keep_outside(np.array(Image.open(folder / "mask.png")) > 127, model.schedule)
    else:
        words, keep = ["--keep-scales", "2"], keep_scales(2, model.schedule)
    words = ["--image", str(folder / "photo.png"), *words, "--classes", "3,7", "--per-class", "1"]
    found = drawn(folder, tmp_path / "images", *words)
    assert np.array_equal(found, to_uint8(sample(model, tokenizer, [3, 7], given=Given(tokens, keep))))
    facts = json.loads(made_by_of(next((tmp_path / "images").iterdir())) or "")
    assert len(facts["image"]) == 16
    assert "/" not in json.dumps(facts)


def test_strips_show_every_scale(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row an image, the finest scale last; a batch at a time."""
    shown: dict[str, Any] = {}
    monkeypatch.setattr(
        "mepa_ds.images.pictures.save_grid",
        lambda images, path, columns, **words: shown.update(images=images, columns=columns, **words),
    )
    paths = ["--weights", str(folder / "model"), "--tokenizer", str(folder / "tokenizer")]
    words = ["--classes", "3,5", "--per-class", "2", "--batch-size", "3", "--out", str(tmp_path / "grid.png")]
    command.main([*paths, *words, "--strips"])
    assert shown["columns"] == len(TINY_SCALES)
    assert shown["rows"] == ["class 3", "class 3", "class 5", "class 5"]
    rows = shown["images"].unflatten(0, (4, len(TINY_SCALES)))
    levels = to_uint8(rows[:, -1]).astype(int) - expected(folder, [3, 3, 5, 5])
    assert abs(levels).max() <= 1  # batches differ by rounding
    assert not torch.equal(rows[:, 0], rows[:, -1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repaint", "mask.png"], "--repaint says what stays of an image; give it by --image"),
        (["--keep-scales", "2"], "--keep-scales says what stays of an image"),
        (["--image", "photo.png"], "--image: give one of --repaint .* and --keep-scales"),
        (["--image", "photo.png", "--repaint", "mask.png", "--keep-scales", "1"], "--image: give one of"),
        (["--image", "photo.png", "--keep-scales", "4"], r"--keep-scales: .*expected 1\.\.3, got 4"),
        (["--image", "photo.png", "--repaint", "small.png"], r"small\.png has 8 x 8 pixels, the image 64 x 64; give a"),
        (["--image", "photo.png", "--repaint", "black.png"], r"--repaint: .*black\.png: nothing of it is white; paint"),
        (["--image", "wide.png", "--repaint", "rim.png"], r"rim\.png: nothing of it is white in the square that the"),
        (["--share", "0.3"], "--share is the share of a second class; give it by --towards"),
        (["--towards", "3", "--share", "2"], r"^--share: expected a number in 0\.\.1, got 2"),
        (["--top-k", "1", "2"], "^--top-k: has 2 values, the model 4 scales; give one, or one for each"),
        (["--guided-scales", "3", "2"], "^--guided-scales: expected the first and the last"),
        (["--rng", "var", "--seed", str(2**70)], r"^--seed: VAR's order of draws takes 0\.\.\d+, got \d+"),
        (["--seed", "-1"], "^--seed: expected a whole number of at least 0"),
        (["--image", "nowhere.png", "--keep-scales", "1"], r"--image: .*nowhere\.png: cannot be read: No such file"),
        (["--image", "text.png", "--keep-scales", "1"], r"--image: .*text\.png: not a readable image"),
        (["--negative", "3,4"], "--negative: expected one class, got 2"),
        (["--towards", "12"], "--towards: 12 goes beyond the model's classes 0..9"),
        (["--cfg", "1", "2"], "cfg: has 2 values, the model 4 scales"),
        (["--temperature", "0"], "temperature: expected a finite number above 0"),
        (["--strips"], "--strips shows images in a grid"),
    ],
)
def test_bad_words(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    Image.new("L", (8, 8), 255).save(folder / "small.png")
    Image.new("L", (SIDE, SIDE)).save(folder / "black.png")
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (3 * SIDE, SIDE)).save(folder / "wide.png")
    rim = Image.new("L", (3 * SIDE, SIDE))
    rim.paste(255, (0, 0, SIDE // 2, SIDE))
    rim.save(folder / "rim.png")
    paths = ["--weights", "model", "--tokenizer", "tokenizer", "--out", str(tmp_path / "images"), "--per-class", "1"]
    with pytest.raises(UserError, match=message):
        command.main([*paths, "--classes", "3", *words])
    assert not list((tmp_path / "images").glob("*.png"))
