"""Names of classes: what people write, captions, files, and weights that keep the names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mepa_ds.checkpoint.run_models import find_model, find_run
from mepa_ds.cli import sample as command
from mepa_ds.errors import UserError
from mepa_ds.generation.class_names import caption, file_word, parse_classes, which_of, written_name
from mepa_ds.generation.sample_files import image_paths
from mepa_ds.generation.sampling import sample
from mepa_ds.images.sets import ImageFiles
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer.tokenizer import Tokenizer
from mepa_ds.weights.directories import read_class_names
from tests.serving.project import NAMES, make_project

SOME = ("T-shirt/top", "Ankle boot", "tench, Tinca", '6" pipe', "3", "Crane", "crane", "Élan", "1-2", "all", "Crane")


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("all", list(range(11))),
        ("Ankle boot,3", [1, 3]),
        (" ankle  BOOT , T-shirt/top,9-10", [1, 0, 9, 10]),
        ('"tench, Tinca", 2-4', [2, 2, 3, 4]),
        ('"3",3', [4, 3]),
        ('"1-2","all"', [8, 9]),
        ('6" pipe,"6"" pipe"', [3, 3]),
        ("E\u0301lan", [7]),  # the same letter, written in two parts
        ("crane", [6]),  # as it is written, there is one
    ],
)
def test_classes_by_name(text: str, classes: list[int]) -> None:
    assert parse_classes(text, len(SOME), SOME) == classes


def test_every_name_can_be_written() -> None:
    for label, name in enumerate(SOME):
        if SOME.count(name) == 1:
            assert parse_classes(written_name(name), len(SOME), SOME) == [label]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tench", r"--classes: no class is named 'tench'; the nearest are \"tench, Tinca\" \(2\)$"),
        ("Ankel boot", r"no class is named 'Ankel boot'; the nearest are Ankle boot \(1\)"),
        ("Zwölf", r"no class is named 'Zwölf'; the names begin with T-shirt/top \(0\), Ankle boot \(1\), \"tench"),
        ("Crane", "2 classes are named 'Crane'; give one by its number: 5, 10"),
        ("CRANE", "3 classes are named 'CRANE'; give one by its number: 5, 6, 10"),
        ('"abc', "the quotes in '\"abc' do not fit"),
        ('"a"b,1', "do not fit"),
        ("11", r"11 goes beyond the model's classes 0\.\.10"),
        ("1,,2", "expected numbers and ranges such as 1,3,5-9, names, or all; got '1,,2'"),
        ("", "expected numbers and ranges"),
    ],
)
def test_names_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_classes(text, len(SOME), SOME)


def test_without_names_only_numbers() -> None:
    for names in ((), ("", "")):
        with pytest.raises(UserError, match="these weights do not name their classes"):
            parse_classes("boot" if not names else '"boot"', 2, names)


def test_captions_and_files() -> None:
    assert [caption(label, ("Shirt", "1", "a\nb")) for label in range(4)] == ["0 Shirt", "class 1", "2 a b", "class 3"]
    assert [file_word(label, ("T-shirt/top", "1", "../é x", "履")) for label in range(5)] == [
        "class0000_T-shirt-top",
        "class0001",
        "class0002_e-x",
        "class0003",
        "class0004",
    ]
    assert (which_of([0, 1], 2), which_of([0, 0, 1], 3)) == ("", "; 2 of 3 classes")


def test_names_go_with_the_weights(tmp_path: Path) -> None:
    best = make_project(tmp_path) / "best"
    model = NextScaleTransformer.open(best)
    assert model.class_names == NextScaleTransformer.load(best).class_names == NAMES
    config = json.loads((best / "config.json").read_text())
    assert config["id2label"] == {str(label): name for label, name in enumerate(NAMES)}
    assert config["label2id"] == {name: label for label, name in enumerate(NAMES)}
    model.class_names = ("Crane", "", "Crane")
    model.save_pretrained(tmp_path / "twins")
    assert json.loads((tmp_path / "twins/config.json").read_text())["label2id"] == {}
    assert read_class_names(tmp_path / "twins") == ("Crane", "", "Crane")
    tokenizer = Tokenizer.load(tmp_path / "runs/tokenizer")
    with pytest.raises(UserError, match="labels: 2 classes are named 'Crane'; give one by its number: 0, 2"):
        sample(model, tokenizer, ["Crane"])
    # A config.json that somebody has edited: some names are enough; what is no name is told.
    for names, expected in (({"1": "Bag"}, ("", "Bag")), ({}, ()), (None, ())):
        (tmp_path / "twins/config.json").write_text(json.dumps({**config, "id2label": names}))
        assert NextScaleTransformer.open(tmp_path / "twins").class_names == expected
    for wrong in (["Bag"], {"one": "Bag"}, {"-1": "Bag"}):
        (tmp_path / "twins/config.json").write_text(json.dumps({**config, "id2label": wrong}))
        with pytest.raises(UserError, match=r"config\.json: id2label: expected names by class"):
            NextScaleTransformer.open(tmp_path / "twins")


def test_python_takes_names(tmp_path: Path) -> None:
    model = NextScaleTransformer.open(make_project(tmp_path) / "best")
    tokenizer = Tokenizer.load(tmp_path / "runs/tokenizer")
    by_name = sample(model, tokenizer, ["t-shirt/TOP", 2, NAMES[1]])
    assert torch.equal(by_name, sample(model, tokenizer, [0, 2, 1]))
    assert torch.equal(by_name, sample(model, tokenizer, np.array(["T-shirt/top", NAMES[2], NAMES[1]])))
    for labels, message in (
        ("Bag", "expected a list with a class for each image"),
        (["Bag"], "no class is named 'Bag'"),
    ):
        with pytest.raises(UserError, match=message):
            sample(model, tokenizer, labels)


def test_a_run_tells_its_weights_and_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_project(tmp_path / "project")
    assert find_run(tmp_path / "project") == find_run(tmp_path / "project/runs") == find_run(run) == run
    assert [find_model(run, wanted).source.name for wanted in ("best", "newest")] == ["best", "last"]  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)  # the recipe's paths are relative to the project
    out = tmp_path / "images"
    words = ["--run", "project", "--per-class", "2", "--classes", 'T-shirt/top,"tench, Tinca tinca"']
    command.main([*words, "--out", str(out)])
    said = capsys.readouterr().out
    assert said.startswith("weights: project/runs/pretrain/best, step 10\n4 images in ")
    names = [path.name for path in sorted(out.iterdir())]
    assert names[:3] == [
        "class0000_T-shirt-top_00000.png",
        "class0000_T-shirt-top_00001.png",
        "class0001_tench-Tinca-tinca_00002.png",
    ]
    assert ImageFiles(out).labels.tolist() == [0, 0, 1, 1]  # type: ignore[union-attr]
    command.main([*words, "--out", str(out)])
    assert "\n0 images in" in capsys.readouterr().out, "they are all there"
    # A directory of an earlier version has no names in it: it goes on as it began.
    for path in out.iterdir():
        path.rename(out / f"{path.name[:9]}_{path.stem[-5:]}.png")
    (out / "class0000_00001.png").unlink()
    command.main([*words, "--batch-size", "1", "--out", str(out)])
    assert "\n1 images in" in capsys.readouterr().out
    assert len(list(out.iterdir())) == 4


def test_runs_that_cannot_be_found(tmp_path: Path) -> None:
    first = make_project(tmp_path / "one")
    for options, message in [
        (["--run", str(tmp_path / "none")], "--run: .*none is not there; give the output_dir of a pretraining run"),
        (["--run", str(first / "best")], "best is a directory without a run"),
        (["--run", str(first), "--weights", str(first / "best")], "give one of --run"),
        ([], "give one of --run"),
        (["--weights", str(first / "best"), "--classes", "Bag"], "--classes: no class is named 'Bag'"),
        (["--run", str(first), "--tokenizer", str(tmp_path / "none")], "none: cannot read the weights"),
    ]:
        with pytest.raises(UserError, match=message):
            command.main([*options, "--out", str(tmp_path / "x.png")])
    first.with_name("second").mkdir()
    for name in ("metrics.jsonl", "resolved.yaml"):
        (first.with_name("second") / name).write_bytes((first / name).read_bytes())
    with pytest.raises(UserError, match=r"one: has 2 runs; give one of them: .*/runs/pretrain, .*/runs/second"):
        command.main(["--run", str(tmp_path / "one"), "--out", str(tmp_path / "x.png")])
    with pytest.raises(UserError, match="second: a run without a checkpoint or exported weights; wait for its first"):
        command.main(["--run", str(first.with_name("second")), "--out", str(tmp_path / "x.png")])
    (tmp_path / "one/runs/tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--tokenizer: runs/tokenizer, which the run names, is not there"):
        command.main(["--run", str(first), "--out", str(tmp_path / "x.png")])


def test_a_class_without_a_word_of_ascii_does_not_make_a_directory_an_old_one(tmp_path: Path) -> None:
    """A killed command goes on there: its files keep their names."""
    names, labels = ("cat", "猫", "2", ""), [0, 1, 2, 3]
    paths = image_paths(tmp_path, labels, names)
    assert [path.name for path in paths[:2]] == ["class0000_cat_00000.png", "class0001_00001.png"]
    for path in paths:
        path.touch()
        assert image_paths(tmp_path, labels, names) == paths
    (tmp_path / "class0000_00000.png").touch()  # of an earlier version, which had no names
    assert image_paths(tmp_path, labels, names)[0].name == "class0000_00000.png"
