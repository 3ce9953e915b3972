"""What an output_dir holds already: links that lead elsewhere, and what no run has written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mepa_ds.checkpoint.background_writer import _make_anew
from mepa_ds.checkpoint.files import check_exports, checkpoint_name, clean, prune, publish
from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.errors import UserError
from mepa_ds.project.stages.run import Spent, Stage, StageRun
from mepa_ds.runtime.failures import _claim_path, _reports
from mepa_ds.runtime.metrics import MetricsWriter, read_metrics
from mepa_ds.runtime.output import owned
from mepa_ds.runtime.run_lock import RunLock, is_held
from mepa_ds.runtime.status import read_status, write_status
from mepa_ds.safety.places import open_anew
from mepa_ds.scaling.study.directory import write_recipes
from mepa_ds.weights.directories import save_pretrained

WORK = "years of work"


@pytest.fixture
def thesis(tmp_path: Path) -> Path:
    (tmp_path / "home/thesis").mkdir(parents=True)
    (tmp_path / "home/thesis/thesis.tex").write_text(WORK)
    return tmp_path / "home/thesis"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_nothing_is_written_through_a_link(run: Path, thesis: Path) -> None:
    for name in (".lock", "metrics.jsonl", "status.json", "hang_rank_00000.txt"):
        (run / name).symlink_to(thesis / "thesis.tex")
    with owned(run):
        write_status(run, "running", step=1)
        MetricsWriter(run / "metrics.jsonl").write({"event": "train"})
        with open_anew(run / "hang_rank_00000.txt") as file:
            file.write(b"stacks")
    assert not is_held(run)
    assert (thesis / "thesis.tex").read_text() == WORK
    assert [record["event"] for record in read_metrics(run / "metrics.jsonl")] == ["train"]


def test_a_lock_that_is_a_link_is_replaced_and_still_locks(run: Path, thesis: Path) -> None:
    (run / ".lock").symlink_to(thesis / "thesis.tex")
    lock = RunLock(run)
    lock.take()
    assert not (run / ".lock").is_symlink()
    assert b"process" in (run / ".lock").read_bytes()
    lock.release()
    assert (thesis / "thesis.tex").read_text() == WORK


@pytest.mark.parametrize("name", ["checkpoints", "samples", "errors", "bad_batches", "tensorboard"])
def test_a_directory_that_is_a_link_is_refused(run: Path, thesis: Path, name: str) -> None:
    (run / name).symlink_to(thesis)
    with pytest.raises(UserError, match=f"output_dir: {run}/{name} is a link to"), owned(run):
        pass
    assert os.listdir(thesis) == ["thesis.tex"]


def test_devices_and_pipes_are_not_read(run: Path) -> None:
    (run / "metrics.jsonl").symlink_to("/dev/zero")
    (run / "status.json").symlink_to("/dev/zero")
    os.mkfifo(run / ".lock")
    (run / "errors").mkdir()
    _claim_path(run / "errors").symlink_to("/dev/zero")
    (run / "errors/rank_0.json").symlink_to("/dev/zero")
    (run / "errors/rank_1.json").write_text('{"time": 1e300, "rank": "x"}')
    assert list(read_metrics(run / "metrics.jsonl")) == []
    assert read_status(run) == {}
    assert not is_held(run)
    assert _reports(run / "errors", 0.0) == []


def test_records_of_any_size_and_depth_cost_nothing(run: Path) -> None:
    line = json.dumps({"event": "train"})
    (run / "metrics.jsonl").write_text(f"{line}\n{'[' * 200_000}\n{'x' * (1 << 25)}\n{line}\n")
    assert len(list(read_metrics(run / "metrics.jsonl"))) == 2
    (run / "status.json").write_text('{"state": 3, "step": "x", "loss": [1], "error": "e"}')
    assert read_status(run) == {"error": "e"}


def test_what_no_run_has_written_is_never_deleted(run: Path, thesis: Path) -> None:
    """A `last`, an old checkpoint, or a leftover, by name alone."""
    names = ("last", ".last.tmp", ".best.old", ".step_00000001.pruned", "checkpoints/step_00000001")
    for name in names:
        (run / name).mkdir(parents=True)
        (run / name / "thesis.tex").write_text(WORK)
    (run / "best").mkdir()
    (run / "best/config.json").write_text('{"model_type": "llama"}')
    (run / "best/model.safetensors").write_text(WORK)
    (run / "checkpoints/step_00000002").mkdir()
    (run / ".last_ema.tmp").symlink_to(thesis)
    for name in ("last", "best"):
        with pytest.raises(UserError, match=f"output_dir: {run}/{name} is there, and no run has written it"):
            check_exports(run, (name,))
    clean(run)
    prune(run / "checkpoints", 1, None)
    new = run / ".new"
    new.mkdir()
    (new / "config.json").touch()
    for name in ("last", "best"):
        with pytest.raises(FileExistsError):
            publish(new, run / name)
    for name in names:
        assert (run / name / "thesis.tex").read_text() == WORK
    assert (run / "best/model.safetensors").read_text() == WORK
    assert (thesis / "thesis.tex").read_text() == WORK
    _make_anew(run / ".last.tmp")
    assert (run / ".last.tmp.foreign1/thesis.tex").read_text() == WORK


def test_what_runs_have_written_is_deleted(run: Path) -> None:
    half = run / ".step_00000003.tmp"
    half.mkdir()
    for name in ("__0_0.distcp", ".metadata.tmp", "run.json", "manifest.json"):
        (half / name).touch()
    (run / ".last.tmp/weights").mkdir(parents=True)
    (run / ".last.tmp/weights/model.safetensors").touch()
    clean(run)
    assert os.listdir(run) == []
    for step in (1, 2):
        (run / checkpoint_name(step)).mkdir()
        (run / checkpoint_name(step) / "manifest.json").write_text('{"files": {}}')
        (run / checkpoint_name(step) / "notes.txt").touch()
    prune(run, 1, None)
    assert os.listdir(run) == [checkpoint_name(2)]


def test_another_model_is_not_replaced(run: Path) -> None:
    (run / "config.json").write_text('{"model_type": "llama"}')
    (run / "model.safetensors").write_text(WORK)
    config = TokenizerConfig(scales=(1,), codebook_size=2, code_width=2, channels=32, channel_multipliers=(1,))
    with pytest.raises(UserError, match="holds a model of type 'llama'"):
        save_pretrained(run, config, {}, "tokenizer")
    assert (run / "model.safetensors").read_text() == WORK


def test_outputs_of_a_project_that_no_stage_has_made_are_renamed(run: Path) -> None:
    stage = Stage("a", "b", (), (run / "out",), ())
    (run / "out").mkdir()
    (run / "out/thesis.tex").write_text(WORK)
    stages = StageRun([stage], run / "progress.json", "quickstart")
    stages._forget([stage])
    assert (run / "out.before1/thesis.tex").read_text() == WORK
    (run / "out").mkdir()
    stages.spent["a"] = Spent(work="1234")
    stages._forget([stage])
    assert sorted(os.listdir(run)) == ["out.before1"]


def test_recipes_of_others_stay(run: Path) -> None:
    """output_dir may be a clone, which has a folder `recipes` of its own."""
    (run / "recipes").mkdir()
    (run / "recipes/mine.yaml").write_text("output_dir: runs/mine\n")
    (run / "recipes/old.yaml").write_text(f"output_dir: {run}/runs/old\n")
    write_recipes(run, {}, {"new"})
    assert os.listdir(run / "recipes") == ["mine.yaml"]
