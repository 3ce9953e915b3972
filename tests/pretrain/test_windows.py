"""Records are means since the last one, whatever stops a run in between; status.json keeps up."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mepa_ds.checkpoint.files import checkpoint_name
from mepa_ds.checkpoint.state import read_state
from mepa_ds.config.changes import recipe_changes
from mepa_ds.engine.waiting import WaitingClock
from mepa_ds.generation import sample_grids
from mepa_ds.generation.sample_grids import SampleGrids, UnwrittenError
from mepa_ds.objective.objective import Losses, ScaleScores
from mepa_ds.pretrain.recording.report import StepClock, StepReport
from mepa_ds.pretrain.recording.window import Window
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.runtime.recorder import RunRecorder
from tests.ranks import arguments, finish
from tests.tiny_run import make_run, recipe_values

MEANS = ("loss", "ce", "alignment", "balance", "grad_norm", "steps")
SCORES = ("ce_scale", "accuracy_scale", "accuracy", "ce_last")


def train_records(output: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(output / "metrics.jsonl") if record["event"] == "train"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    settings = ["log.every=4", "log.checkpoint_every=6", "log.keep_checkpoints=9", "log.evaluate_every=100"]
    make_run(folder, "train.steps=12", *settings)
    finish(arguments(folder, "whole"), 1, folder / "whole.log")
    return folder


def test_a_record_is_the_mean_of_its_steps(folder: Path) -> None:
    finish(arguments(folder, "single", "log.every=1"), 1, folder / "single.log")
    single, whole = train_records(folder / "single"), train_records(folder / "whole")
    assert [record["step"] for record in whole] == [4, 8, 12]
    for number, record in enumerate(whole):
        steps = single[4 * number : 4 * number + 4]
        assert record["steps"] == 4
        for key in ("loss", "ce", "alignment", "balance", "grad_norm", "accuracy", "ce_last"):
            assert record[key] == pytest.approx(sum(step[key] for step in steps) / 4, rel=1e-6), key
        assert record["step_loss"] == steps[-1]["loss"] != record["loss"]
        assert record["images_per_second"] == pytest.approx(8 / record["mean_step_seconds"])


def test_a_window_that_a_stop_cuts_in_two_has_the_same_mean(folder: Path) -> None:
    """The checkpoint of step 6 carries the sums of steps 5 and 6; the recipe's change is told once."""
    checkpoint = Path("checkpoints") / checkpoint_name(6)
    assert read_state(folder / "whole" / checkpoint).window["steps"] == 2
    assert read_state(folder / "whole/checkpoints" / checkpoint_name(12)).window == {}
    shutil.copytree(folder / "whole" / checkpoint, folder / "cut" / checkpoint)
    log = finish(arguments(folder, "cut", "log.keep_checkpoints=3", "guards.time_limit=60"), 1, folder / "cut.log")
    for ours, theirs in zip(train_records(folder / "cut"), train_records(folder / "whole")[1:], strict=True):
        for key in (*MEANS, *SCORES):
            assert ours[key] == theirs[key], key
    (record,) = [r for r in read_metrics(folder / "cut/metrics.jsonl") if r["event"] == "recipe_changed"]
    assert record["changes"] == {
        "guards.time_limit": [None, 60.0],
        "log.keep_checkpoints": [9, 3],
        "output_dir": [str(folder / "whole"), str(folder / "cut")],
    }
    assert "the recipe has changed since the last checkpoint: guards.time_limit null -> 60.0, log.keep_c" in log
    log = finish(arguments(folder, "cut", "log.keep_checkpoints=3", "guards.time_limit=60"), 1, folder / "cut.log")
    assert log.count("the recipe has changed") == 1


def report(loss: float, applied: bool = True) -> StepReport:
    scores = ScaleScores(*(torch.full((2,), value) for value in (loss, 1.0, 2.0)))
    losses = Losses(torch.tensor(loss), {"ce": torch.tensor(loss), "total": torch.tensor(loss)}, scores, {})
    clock = StepClock(False, WaitingClock())
    return StepReport(1, 0.1, 2, [losses], 10 * loss if applied else math.nan, applied, clock)


def test_skipped_steps_are_not_averaged_in() -> None:
    window = Window({})
    for loss, applied in ((1.0, True), (math.nan, False), (2.0, True)):
        window.note(report(loss, applied))
    assert window.reduce()[1] == [1.0, 2.0]
    means = window.means(["ce", "total"], num_scales=2)
    assert (means["steps"], means["loss"], means["ce"], means["grad_norm"]) == (2, 1.5, 1.5, 15.0)
    assert (means["ce_scale"], means["accuracy"]) == ([0.75, 0.75], 0.5)
    assert window.reduce() == ({}, []), "it begins anew"
    window.note(report(math.nan, applied=False))
    means = window.means(["ce", "total"], num_scales=2)
    assert means["steps"] == 0
    assert math.isnan(means["loss"])
    assert math.isnan(means["grad_norm"])


def test_a_rollback_takes_the_steps_since_its_checkpoint_again() -> None:
    window = Window({})
    window.note(report(1.0))
    kept, _ = window.reduce()
    window.note(report(5.0))
    window.restart(json.loads(json.dumps(kept)))
    window.note(report(3.0))
    window.reduce()
    assert window.means(["ce", "total"], num_scales=2)["loss"] == 2.0


def test_the_status_knows_the_current_step_without_a_record(tmp_path: Path) -> None:
    recorder = RunRecorder(Path(recipe_values(tmp_path)["output_dir"]), 0, 50, 0)
    recorder._status_due = 0.0
    recorder.advance(30)
    recorder.advance(31)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status == {"state": "running", "step": 30, "num_steps": 50}, "and not with every step"


def test_pictures_show_all_classes_or_say_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_grids, "sample", lambda *_, **__: torch.zeros(8, 3, 2, 2))
    tokenizer: Any = SimpleNamespace()

    def grids(num_classes: int, alone: bool = True) -> SampleGrids:
        return SampleGrids(tokenizer, tmp_path, num_classes, seed=0, alone=alone)

    assert grids(10).classes == list(range(10))
    assert grids(10).shown == "a row a class"
    assert grids(1000).classes == [0, 125, 250, 375, 500, 625, 750, 875]
    assert grids(1000).shown == "rows: classes 0, 125, 250, 375, 500, 625, 750, 875 of 1000"
    model: Any = None
    drawn: dict[str, Any] = {}
    save_grid = sample_grids.save_grid
    monkeypatch.setattr(
        sample_grids, "save_grid", lambda *a, **captions: drawn.update(captions) or save_grid(*a, **captions)
    )
    named = SampleGrids(tokenizer, tmp_path, 2, seed=0, alone=True, class_names=("Shirt", "1"))
    assert named.write(model, 1, lambda: None).exists()
    assert drawn == {"title": "step 1", "rows": ["0 Shirt", "class 1"]}
    grids(1000).write(model, 1, lambda: None)
    assert drawn["title"] == "step 1; 8 of 1000 classes"
    monkeypatch.setattr(sample_grids, "save_grid", lambda *_, **__: 1 / 0)
    with pytest.raises(UnwrittenError, match="division by zero"):
        grids(2).write(model, 1, lambda: None)


def test_what_is_different_in_a_recipe() -> None:
    old = {"a": {"b": 1, "c": None}, "d": [1, 2], "gone": True}
    new = {"a": {"b": 2, "c": {"e": 3}}, "d": [1, 2], "new": None}
    assert recipe_changes(old, new) == {
        "a.b": [1, 2],
        "a.c": [None, "absent"],
        "a.c.e": ["absent", 3],
        "gone": [True, "absent"],
    }
