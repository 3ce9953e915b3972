"""What `mepa init` writes, and what it does where it has written before."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mepa_ds.cli import init
from mepa_ds.config.base import load_config
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.config.tokenizer_training import TokenizerTrainingConfig
from mepa_ds.data_tools.build_shards import build, parse
from mepa_ds.errors import UserError
from mepa_ds.project import making
from mepa_ds.project.choosing.choose import choose
from mepa_ds.project.commands import shell_script, stages
from mepa_ds.project.layout import Layout
from mepa_ds.project.looking.digits import DIGITS_FACTS
from mepa_ds.project.looking.facts import MachineFacts
from mepa_ds.project.making import make_project
from mepa_ds.project.running import run_project
from tests.on_request import FULL
from tests.project.test_looking import folder, picture
from tests.tiny_run import ROOT

NOTHING = dict.fromkeys(("minutes", "gpus", "memory", "side", "teacher"))
ODD = {"Ankle boot": 6, 'say "it\'s"': 6, "a,b": 6, "寿司 $HOME": 6}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "this_machine", lambda gpus, memory: MachineFacts())


def asked(**values: Any) -> dict[str, Any]:
    return NOTHING | values


def test_the_recipes_load_and_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = folder(tmp_path / "own images", ODD)
    images, chosen, _ = make_project(tmp_path / "project", str(own), asked())
    recipe = load_config(PretrainConfig, tmp_path / "project/pretrain.yaml")
    tokenizer = load_config(TokenizerTrainingConfig, tmp_path / "project/tokenizer.yaml")
    assert (recipe.model.num_classes, recipe.train.global_batch) == (4, chosen.batch)
    assert (tokenizer.tokenizer.scales, tokenizer.train.steps) == (chosen.scales, chosen.tokenizer_steps)
    text = (tmp_path / "project/pretrain.yaml").read_text()
    assert all(f"# {chosen.why[name][:40]}" in text for name in ("steps", "size"))
    assert max(len(line) for line in text.splitlines()) <= 120
    out = capsys.readouterr().out
    for part in ("24 in 4 classes", "held out: 4 images", "side:     32 pixels", "written:  tokenizer.yaml"):
        assert part in out
    facts = json.loads((tmp_path / "project/project.json").read_text())
    assert facts["images"]["classes"] == sorted(ODD) == list(images.classes)
    assert facts["choices"]["side"] == 32


def test_the_commands_are_words_that_the_shell_gives_back(tmp_path: Path) -> None:
    """Run as far as the shards, they have every image once, in sets with the names of the classes."""
    own = folder(tmp_path / "it's mine, $HOME", ODD)
    project = tmp_path / "project"
    images, chosen, layout = make_project(project, str(own), asked())
    script = (project / "commands.sh").read_text()
    subprocess.run(["bash", "-n", str(project / "commands.sh")], check=True, timeout=20)
    sizes = []
    for command in stages(images, chosen, layout)[0].commands:
        words = shlex.split(command)[4:]
        assert (
            shlex.split(next(line for line in script.splitlines() if line.endswith(command[len("-m mepa_ds") :])))[3:]
            == words
        )
        here = parse([*words, "--workers", "0"])
        index = build(here.reader, here.options.__class__(**{**vars(here.options), "out": project / here.options.out}))
        assert index is not None
        assert index.classes == tuple(sorted(ODD))
        sizes.append(index.num_samples)
    assert sizes == [20, 4]


def test_a_second_start_finds_the_first_ones_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, project = folder(tmp_path / "own", {"a": 40, "b": 40}), tmp_path / "project"
    first = make_project(project, str(own), asked(minutes=3.0))
    before = {path.name: path.read_bytes() for path in project.iterdir()}
    assert make_project(project, str(own), asked(minutes=3.0))[1] == first[1]
    assert {path.name: path.read_bytes() for path in project.iterdir()} == before
    assert "of an earlier start with the same images and options" in capsys.readouterr().out

    with (project / "pretrain.yaml").open("a") as recipe:
        recipe.write("# mine\n")
    (project / "tokenizer.yaml").unlink()
    make_project(project, str(own), asked(minutes=3.0))
    assert "kept:     pretrain.yaml as edited since" in capsys.readouterr().out
    assert (project / "pretrain.yaml").read_text().endswith("# mine\n")
    assert (project / "tokenizer.yaml").read_bytes() == before["tokenizer.yaml"]
    with pytest.raises(UserError, match=r"pretrain.yaml has been edited since mepa init wrote it"):
        make_project(project, str(own), asked(minutes=4.0))
    (project / "pretrain.yaml").unlink()  # the remedy
    make_project(project, str(own), asked(minutes=60.0))
    assert (project / "pretrain.yaml").read_bytes() != before["pretrain.yaml"]


def test_other_images_are_chosen_for_anew(tmp_path: Path) -> None:
    own, project = folder(tmp_path / "own", {"a": 9, "b": 9}), tmp_path / "project"
    make_project(project, str(own), asked())
    folder(own, {"c": 9})
    make_project(project, str(own), asked())
    assert load_config(PretrainConfig, project / "pretrain.yaml").model.num_classes == 3


def test_digits_need_no_folder(tmp_path: Path) -> None:
    images, chosen, layout = make_project(tmp_path / "project", "digits", asked())
    assert images == DIGITS_FACTS
    assert load_config(PretrainConfig, tmp_path / "project/pretrain.yaml").train.steps == 400
    assert stages(images, chosen, layout)[0].commands[0].endswith("digits --split train --out data/train")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("own/a/project", "is inside the images' folder, where it would be taken for a class"),
        ("own", "is inside the images' folder"),
        ("other", "holds other things, and no project.json; give a directory that is new or empty"),
        ("file", "file: is a file"),
        ("broken", "broken/project.json: cannot be read .*; remove it, and recipes are written anew"),
    ],
)
def test_places_where_no_project_can_be(tmp_path: Path, out: str, message: str) -> None:
    own = folder(tmp_path / "own", {"a": 2})
    picture(tmp_path / "other/mine.png")
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/project.json").write_text('{"version": 7}')
    with pytest.raises(UserError, match=message):
        make_project(tmp_path / out, str(own), asked())


def test_half_of_a_hundred_classes_is_shown_and_said(tmp_path: Path) -> None:
    own = folder(tmp_path / "own", {f"class {number}": 1 for number in range(100)})
    images, chosen, _ = make_project(tmp_path / "project", str(own), asked())
    samples = next(stage for stage in stages(images, chosen, Layout()) if stage.name == "samples")
    assert "20 of the 100 classes" in samples.meaning
    assert "--weights runs/pretrain/last" in samples.commands[0]


def mepa(*words: str, here: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mepa_ds", *words]
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=900, check=False)


def test_mistakes_are_one_message(tmp_path: Path) -> None:
    end = mepa("init", "none", "--out", "project", here=tmp_path)
    assert (end.returncode, end.stdout) == (2, "")
    assert end.stderr == (
        f"error: {tmp_path}/none: no such folder; give a folder of class folders, a folder of images, a shard set, or "
        "the word digits (archives, parquet and others become shard sets by mepa data build)\n"
    )
    with pytest.raises(UserError, match=r"--gpus 99: --run trains on this machine, which has \d; leave --run out"):
        init.main(["digits", "--out", str(tmp_path / "x"), "--gpus", "99", "--run"])


@pytest.mark.skipif(not FULL, reason="some minutes: all stages; the quickstart's test runs the same code on the digits")
@pytest.mark.timeout(1000)
def test_a_whole_project_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name, level in (("dark, really", 60), ("bright", 190)):
        for number in range(40):
            (tmp_path / "own" / name).mkdir(parents=True, exist_ok=True)
            pixels = (level + draw.normal(0, 20, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "own" / name / f"{number}.png")
    words = ("init", "own", "--out", "project", "--minutes", "0.5")
    assert mepa(*words, here=tmp_path).returncode == 0
    for name in ("tokenizer.yaml", "pretrain.yaml"):
        path = tmp_path / "project" / name
        path.write_text(path.read_text().replace("steps: 200", "steps: 20"))
    first = mepa(*words, "--run", here=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "as edited since" in first.stdout
    report = json.loads((tmp_path / "project/runs/report.json").read_text())
    assert 0 <= report["class_agreement"] <= 1
    (tmp_path / "project/runs/samples.png").unlink()
    second = mepa(*words, "--run", here=tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("finished before, skipped") == 4
    assert (tmp_path / "project/runs/samples.png").exists()


def test_images_that_came_since_are_built_and_trained_anew(tmp_path: Path) -> None:
    """The commands that build shards are the same: the stage must tell the images itself."""
    own, project = folder(tmp_path / "own", {"a": 30, "b": 30}), tmp_path / "project"
    first = stages(*make_project(project, str(own), asked()))[0]
    assert stages(*make_project(project, str(own), asked()))[0] == first
    picture(own / "a/more.png")
    second = stages(*make_project(project, str(own), asked()))[0]
    assert second.commands == first.commands
    assert second.inputs != first.inputs


def test_a_folder_with_a_line_break_in_its_name_gives_no_command_of_its_own(tmp_path: Path) -> None:
    own = folder(tmp_path / "own\ntouch x", {"a": 3, "b": 3})
    make_project(tmp_path / "project", str(own), asked())
    script = (tmp_path / "project/commands.sh").read_text()
    assert f"# From {tmp_path}/own\\ntouch x to a model" in script, "the line break as text"
    assert load_config(PretrainConfig, tmp_path / "project/pretrain.yaml").model.num_classes == 2


@pytest.mark.parametrize(
    ("gpus", "teacher", "files"),
    [
        (8, None, ["vae_ch160v4096z32.pth", "dinov2_vitb14_pretrain.pth"]),
        (8, "none", ["vae_ch160v4096z32.pth"]),
        (None, "dinov2-b", ["dinov2_vitb14_pretrain.pth"]),
    ],
)
def test_what_others_have_published_is_asked_for_before_work_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int | None, teacher: Any, files: list[str]
) -> None:
    images = replace(DIGITS_FACTS, kind="folder", sides=(300, 300, 300))
    chosen = choose(images, MachineFacts(gpus=gpus or 0), teacher=teacher)
    script = shell_script(images, chosen, Layout(), ())
    assert [line.rpartition("/")[2] for line in script.splitlines() if "curl" in line] == files
    monkeypatch.chdir(tmp_path)
    message = " and ".join(f"weights/{name}" for name in files)
    with pytest.raises(UserError, match=rf"{message} (is|are) not there; commands.sh says from where to fetch"):
        run_project(images, chosen, Layout(), Path(), "mepa init")
    assert not (tmp_path / "runs").exists()


def test_two_starts_in_one_directory_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    holds = "import sys; from pathlib import Path; from mepa_ds.runtime.run_lock import RunLock; "
    holds += "lock = RunLock(Path('runs')); lock.take(); print('taken', flush=True); sys.stdin.read()"
    words, environment = [sys.executable, "-c", holds], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=r"runs: another start is at work there \(process \d+ on "):
            run_project(DIGITS_FACTS, choose(DIGITS_FACTS, MachineFacts()), Layout(), Path(), "mepa init")
        other.communicate()
