"""`mepa sample` on VAR's files and on our directories, and what users get wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from mepa_ds.cli import sample as command
from mepa_ds.cli import upcycle
from mepa_ds.data_tools.precompute import Tokens
from mepa_ds.errors import UserError
from mepa_ds.generation.class_names import parse_classes
from mepa_ds.generation.sampling import Rng, sample
from mepa_ds.images.pictures import made_by_of, save_png, to_uint8
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.scales import parse_sides
from mepa_ds.tokenizer import Tokenizer
from tests.var_fixtures import TINY_SCALES, fixture_state

SCALES = ["--scales", *map(str, TINY_SCALES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as files of VAR's (one of them with an unusual name) and as directories of ours."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(fixture_state("tiny_var_adaln"), folder / "var.pt")
    torch.save(fixture_state("tiny_vae"), folder / "vae.pth")
    NextScaleTransformer.open(folder / "var.pt", TINY_SCALES).save_pretrained(folder / "model.d2")
    Tokenizer.open(folder / "vae.pth", TINY_SCALES).save_pretrained(folder / "tokenizer")
    return folder


def run(folder: Path, out: Path, *options: str, weights: str = "var.pt", tokenizer: str = "vae.pth") -> None:
    paths = ["--weights", str(folder / weights), "--tokenizer", str(folder / tokenizer), "--out", str(out)]
    command.main([*paths, *options])


@pytest.mark.parametrize("rng", ["image", "var"])
def test_a_directory_gets_one_image_each(folder: Path, tmp_path: Path, rng: Rng) -> None:
    options = ["--classes", "2,7-8", "--per-class", "2", "--rng", rng, "--batch-size", "6", "--seed", "3"]
    run(folder, tmp_path / "images", *options, *SCALES)
    names = [f"class{label:04d}_{number:05d}.png" for number, label in enumerate([2, 2, 7, 7, 8, 8])]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == names
    model, tokenizer = NextScaleTransformer.load(folder / "model.d2"), Tokenizer.load(folder / "tokenizer")
    expected = to_uint8(sample(model, tokenizer, [2, 2, 7, 7, 8, 8], seed=3, rng=rng))
    found = np.stack([np.asarray(Image.open(tmp_path / "images" / name)) for name in names])
    assert np.array_equal(found, expected)


def test_images_tell_of_weights_by_hashes_alone(folder: Path, tmp_path: Path) -> None:
    """And of no person, place or machine: the same weights from another place make the same file."""
    options = ["--classes", "1", "--per-class", "1", *SCALES]
    run(folder, tmp_path / "here", *options)
    elsewhere = tmp_path / "home/alice"
    shutil.copytree(folder, elsewhere)
    run(elsewhere, tmp_path / "there", *options)
    name = "class0001_00000.png"
    assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    facts = json.loads(made_by_of(tmp_path / "here" / name) or "")
    assert all(re.fullmatch("[0-9a-f]{16}", facts[part]) for part in ("weights", "tokenizer"))
    assert "/" not in json.dumps(facts)
    run(folder, tmp_path / "here", *options)
    other = Tokenizer.open(folder / "vae.pth", TINY_SCALES)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save_pretrained(folder / "other")
    with pytest.raises(UserError, match="made by other weights or options"):
        run(folder, tmp_path / "here", *options, tokenizer="other")


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", '"x"', "no JSON"])
def test_the_text_of_a_strangers_image_is_no_traceback(folder: Path, tmp_path: Path, text: str) -> None:
    save_png(np.zeros((4, 4, 3), np.uint8), tmp_path / "out/class0003_00000.png", text)
    with pytest.raises(UserError, match="made by another start with other weights or options"):
        run(folder, tmp_path / "out", "--classes", "1", "--per-class", "1", *SCALES)


def test_a_directory_goes_on_where_it_was(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Batches that are whole stay; the result is that of a start that was not interrupted."""
    options = ["--classes", "1,4,6", "--per-class", "2", "--batch-size", "2", *SCALES]
    run(folder, tmp_path / "whole", *options)
    run(folder, tmp_path / "torn", *options)
    (tmp_path / "torn/class0004_00003.png").unlink()
    kept = (tmp_path / "torn/class0001_00000.png").stat().st_mtime_ns
    capsys.readouterr()
    run(folder, tmp_path / "torn", *options)
    assert capsys.readouterr().out.startswith("2 images in ")
    assert (tmp_path / "torn/class0001_00000.png").stat().st_mtime_ns == kept
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "torn" / path.name).read_bytes() == path.read_bytes()
    for other in (["--seed", "1"], ["--cfg", "2"]):
        with pytest.raises(UserError, match=r"class0001_00000\.png: made by other weights or options"):
            run(folder, tmp_path / "torn", *options, *other)


def test_a_file_that_is_not_whole_is_no_finished_image(folder: Path, tmp_path: Path) -> None:
    """Empty or cut, as a full disk or a broken copy leaves it."""
    options = ["--classes", "1,4", "--per-class", "2", "--batch-size", "2", *SCALES]
    run(folder, tmp_path / "images", *options)
    paths = sorted((tmp_path / "images").iterdir())
    whole = [path.read_bytes() for path in paths]
    for damaged in (b"", whole[0][: len(whole[0]) // 2], b"text"):
        for path in (paths[0], paths[3]):
            path.write_bytes(damaged)
        run(folder, tmp_path / "images", *options)
        assert [path.read_bytes() for path in paths] == whole


@pytest.mark.slow
def test_two_halves_of_500_images_are_one_run(folder: Path) -> None:
    """To the bit: image i is a function of the seed and i."""
    model, tokenizer = NextScaleTransformer.load(folder / "model.d2"), Tokenizer.load(folder / "tokenizer")
    labels = [label for label in range(10) for _ in range(50)]
    whole = sample(model, tokenizer, labels, batch_size=50)
    halves = [sample(model, tokenizer, labels[n : n + 250], batch_size=50, first_index=n) for n in (0, 250)]
    assert torch.equal(torch.cat(halves), whole)
    part = sample(model, tokenizer, labels[120:163], batch_size=43, first_index=120)
    assert np.array_equal(to_uint8(part), to_uint8(whole[120:163])), "of another batch size too"


def test_a_directory_is_of_one_kind(folder: Path, tmp_path: Path) -> None:
    """Jobs that draw other classes with other seeds share it; nothing else may lie there, under whatever name."""
    out = tmp_path / "images"
    run(folder, out, "--classes", "1,4", "--per-class", "2", *SCALES)
    run(folder, out, "--classes", "2,5", "--per-class", "2", "--seed", "1", *SCALES)
    names = {path.name for path in out.iterdir()}
    assert len(names) == 8
    for options, culprit in [
        (["--classes", "3", "--per-class", "2", "--cfg", "4"], "class0001"),
        (["--classes", "3", "--per-class", "1"], "class0001"),
        (["--classes", "0,1", "--per-class", "2"], "class0001"),  # 1 would have numbers 2 and 3 as well
    ]:
        with pytest.raises(
            UserError, match=rf"{culprit}_\d+\.png: made by another start with other weights or options"
        ):
            run(folder, out, *options, *SCALES)
    assert {path.name for path in out.iterdir()} == names
    Image.new("RGB", (8, 8)).save(out / "picture.png")
    with pytest.raises(UserError, match=r"picture\.png: made by another start"):
        run(folder, out, "--classes", "3", "--per-class", "2", *SCALES)


def test_too_large_a_batch_is_a_message(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("mepa_ds.generation.sampling.sample", full)
    with pytest.raises(UserError, match="out of GPU memory with 6 images at once; use a smaller --batch-size"):
        run(folder, tmp_path / "x.png", "--classes", "1,4", "--per-class", "3", *SCALES)


def test_files_and_directories_make_the_same_grid(folder: Path, tmp_path: Path) -> None:
    options = ["--classes", "1,4", "--per-class", "3"]
    run(folder, tmp_path / "var.png", *options, *SCALES)
    run(folder, tmp_path / "ours.png", *options, weights="model.d2", tokenizer="tokenizer")
    assert (tmp_path / "var.png").read_bytes() == (tmp_path / "ours.png").read_bytes()
    width, height = Image.open(tmp_path / "var.png").size
    assert width > 3 * 66, "enlarged to 64 pixels, beside the names of the classes"
    assert height > 2 * 66


def test_bf16_is_the_models_type_and_not_the_tokenizers(folder: Path, tmp_path: Path) -> None:
    options = ["--classes", "1,4", "--per-class", "2", "--seed", "5"]
    for precision in ("fp32", "bf16"):
        run(folder, tmp_path / precision, *options, *SCALES, "--precision", precision)
    model, tokenizer = NextScaleTransformer.load(folder / "model.d2"), Tokenizer.load(folder / "tokenizer")
    expected = to_uint8(sample(model.to(torch.bfloat16), tokenizer, [1, 1, 4, 4], seed=5))
    in_bf16, in_fp32 = (
        np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / precision).iterdir())])
        for precision in ("bf16", "fp32")
    )
    assert np.array_equal(in_bf16, expected)
    assert not np.array_equal(in_bf16, in_fp32)


def test_upcycling_reads_what_lies_there(folder: Path, tmp_path: Path) -> None:
    upcycle.main(["--weights", str(folder / "model.d2"), "--out", str(tmp_path / "moe"), "--num-experts", "2"])
    assert NextScaleTransformer.load(tmp_path / "moe").config.moe is not None


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("all", list(range(10))),
        ("3", [3]),
        ("1,3,5-7", [1, 3, 5, 6, 7]),
        (" 2, 4-4 ", [2, 4]),
        ("0-9", list(range(10))),
    ],
)
def test_classes(text: str, classes: list[int]) -> None:
    assert parse_classes(text, 10) == classes


@pytest.mark.parametrize("text", ["", "1,,2", "-3", "3-", "1.5", "cat", "²"])
def test_classes_that_are_no_numbers(text: str) -> None:
    with pytest.raises(UserError, match="--classes: expected numbers and ranges"):
        parse_classes(text, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "9-3"], "--classes: the range 9-3 ends before it begins; write 3-9"),
        (["--classes", "3,8-10"], r"--classes: 8-10 goes beyond the model's classes 0\.\.9"),
        (["--per-class", "0"], "--per-class: expected at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size: expected at least 1, got -1"),
        (["--weights", "nowhere"], "nowhere: cannot read the weights: No such file or directory"),
        (["--tokenizer", "nowhere.pth"], r"nowhere\.pth: cannot read the weights: No such file or directory"),
    ],
)
def test_bad_options(folder: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path / "x.png", *SCALES, *options)
    assert not (tmp_path / "x.png").exists()


def test_schedules_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    state = fixture_state("tiny_var_adaln")
    del state["lvl_1L"]  # without it the file does not tell its schedule
    torch.save(state, folder / "untold.pt")
    with pytest.raises(UserError, match=r"untold\.pt: scales: the weights hold 30 positions, .*or --scales 1 2 3"):
        run(folder, tmp_path / "x.png", weights="untold.pt")
    for weights in ("model.d2", "var.pt"):
        with pytest.raises(UserError, match=rf"scales: .*{weights} was trained with \[1, 2, 3, 4\], and has no other"):
            run(folder, tmp_path / "x.png", "--scales", "1", "2", "4", weights=weights)


def test_what_foreign_files_do_not_tell_is_asked_by_its_option(folder: Path, tmp_path: Path) -> None:
    """Heads without QK normalisation; the image is that of the same model in a directory, whose config tells them."""
    state = fixture_state("tiny_var_adaln_nol2")
    torch.save(state, folder / "nol2.pt")
    options = ["--classes", "1", "--per-class", "2"]
    with pytest.raises(UserError, match=r"nol2\.pt: num_heads: .*--num-heads 2"):
        run(folder, tmp_path / "x.png", *options, weights="nol2.pt")
    NextScaleTransformer.from_var(state, num_heads=4).save_pretrained(folder / "nol2")
    run(folder, tmp_path / "told.png", *options, "--num-heads", "4", weights="nol2.pt")
    run(folder, tmp_path / "ours.png", *options, weights="nol2")
    assert (tmp_path / "told.png").read_bytes() == (tmp_path / "ours.png").read_bytes()
    run(folder, tmp_path / "images", *options, "--num-heads", "4", weights="nol2.pt")
    with pytest.raises(UserError, match="made by other weights or options"):
        run(folder, tmp_path / "images", *options, "--num-heads", "2", weights="nol2.pt")


@pytest.mark.parametrize("words", [["1", "2", "3", "4"], ["1,2,3,4"], ["1,2,", "3", "4"], ["1 2 3 4"]])
def test_both_notations_of_scales_in_every_command(words: list[str]) -> None:
    paths = ["--weights", "w", "--out", "o"]
    assert command.parse([*paths, "--tokenizer", "t", "--scales", *words]).scales == TINY_SCALES
    assert tyro.cli(upcycle.UpcycleOptions, args=[*paths, "--scales", *words]).scales == TINY_SCALES
    assert tyro.cli(Tokens, args=["images", "--tokenizer", "t", "--scales", *words]).scales == TINY_SCALES
    assert command.parse([*paths, "--tokenizer", "t"]).scales is None


@pytest.mark.parametrize("words", ["", "1_2_3_4", "1 2 x", "-1", "1.5", "²"])
def test_scales_that_are_no_numbers(words: str) -> None:
    """VAR's own `1_2_3_4` is 1234 to Python."""
    with pytest.raises(UserError, match="expected sides such as 1 2 3 4, or 1,2,3,4; got"):
        parse_sides([words])
