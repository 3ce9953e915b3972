"""`mepa quickstart` from the first stage to the report, with a few steps of training, and started again."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mepa_ds.cli import quickstart as quickstart_module
from mepa_ds.cli.quickstart import Stage
from mepa_ds.config.base import apply_overrides, read_yaml
from mepa_ds.errors import UserError
from tests.on_request import FULL
from tests.tiny_run import ROOT

SHORT = {
    "quickstart.yaml": ["train.steps=4", "log.every=2", "log.evaluate_every=2", "log.checkpoint_every=2"],
    "tokenizer_quickstart.yaml": ["train.steps=4", "log.every=2", "log.evaluate_every=2", "log.checkpoint_every=2"],
}
KEYS = {
    "stage_seconds",
    "samples_per_second",
    "train_ce",
    "train_ce_last_scale",
    "heldout_ce",
    "heldout_ce_last_scale",
    "world_size",
    "ep_size",
    "zero_stage",
    "total_parameters",
    "active_parameters",
    "expert_load_per_scale",
    "class_agreement",
    "classifier_heldout_accuracy",
    "classifier.fd",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with recipes of its own, the shipped ones cut short, and nothing else of a clone."""
    (tmp_path / "recipes").mkdir()
    for name, overrides in SHORT.items():
        values = apply_overrides(read_yaml(ROOT / "recipes" / name), overrides)
        (tmp_path / "recipes" / name).write_text(yaml.safe_dump(values))
    return tmp_path


def quickstart(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mepa_ds", "quickstart"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.mark.timeout(1100)
def test_quickstart_runs_reports_and_resumes(directory: Path) -> None:
    first = quickstart(directory)
    assert first.returncode == 0, first.stdout + first.stderr
    report = json.loads((directory / "runs/quickstart/report.json").read_text())
    assert report.keys() >= KEYS
    assert (report["world_size"], report["ep_size"], report["zero_stage"]) == (2, 2, 2)
    assert [len(row) for row in report["expert_load_per_scale"]] == [8] * 4
    assert 0 <= report["class_agreement"] <= 1
    assert report["classifier_heldout_accuracy"] > 0.95
    assert set(report["stage_seconds"]) == {
        *("shards", "tokenizer", "precompute", "pretraining", "samples", "scores", "report", "total")
    }
    assert report["stage_peak_memory"].keys() == {
        f"{name}_bytes" for name in ("shards", "tokenizer", "precompute", "pretraining", "samples", "scores", "report")
    }
    assert all(50e6 < peak < 4e9 for peak in report["stage_peak_memory"].values())
    assert (directory / "runs/quickstart/samples.png").stat().st_size > 1000

    if not FULL:  # tests of small stages see what a second start skips
        return
    (directory / "runs/quickstart/samples.png").unlink()
    second = quickstart(directory)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("finished before, skipped") == 4
    assert (directory / "runs/quickstart/samples.png").exists()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Three stages that write what they have read; returns the total seconds of every finished start."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/quickstart.yaml").touch()

    def stage(name: str, code: str) -> Stage:
        files = (Path(name),)
        code = f"from pathlib import Path; own = Path('{name}'); {code}"
        return Stage(name, name, (f"-c {shlex.quote(code)}",), files, files)

    fails = "import time; time.sleep(0.3); Path('broken').exists() and exit(3); "
    stages = (
        stage("a", "own.write_text(Path('version').read_text())"),
        stage("b", fails + "own.write_bytes(Path('a').read_bytes())"),
        stage("c", "own.write_bytes(Path('b').read_bytes() + b'!')"),
    )
    totals: list[float] = []
    monkeypatch.setattr(quickstart_module, "STAGES", stages)
    monkeypatch.setattr(quickstart_module, "STAGES_FILE", tmp_path / "progress.json")
    monkeypatch.setattr(quickstart_module, "_report", lambda _, spent: totals.append(spent["b"].seconds))
    (tmp_path / "version").write_text("1")
    return totals


def stages() -> tuple[Stage, ...]:
    """Those of `small`: mypy knows how many the real quickstart has."""
    return quickstart_module.STAGES


def test_a_stage_that_runs_again_takes_all_later_ones_with_it(small: list[float]) -> None:
    quickstart_module.main([])
    assert Path("c").read_text() == "1!"
    Path("a").unlink()
    Path("version").write_text("2")
    Path("broken").touch()
    with pytest.raises(UserError, match="stage b ended with status 3"):
        quickstart_module.main([])
    assert not Path("c").exists()  # what was made of the old one
    Path("broken").unlink()
    quickstart_module.main([])
    assert Path("c").read_text() == "2!"
    assert small[1] > small[0] + 0.3  # of both starts


def test_a_stage_with_half_of_its_results_starts_anew(small: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that finds its own state finished may not make again what was deleted."""
    first, second, third = stages()
    files = (Path("b"), Path("state"))
    code = "from pathlib import Path; Path('state').exists() or (Path('state').touch(), Path('b').write_text('b'))"
    second = replace(second, commands=(f"-c {shlex.quote(code)}",), outputs=files, results=files)
    monkeypatch.setattr(quickstart_module, "STAGES", (first, second, third))
    quickstart_module.main([])
    Path("b").unlink()
    quickstart_module.main([])
    assert Path("b").read_text() == "b"


def test_a_changed_recipe_is_not_skipped(
    small: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage starts anew, without what it had made, and all later ones too."""
    Path("b.yaml").write_text("1")
    code = "from pathlib import Path; import sys; assert not Path('b').exists(); "
    code += "Path('b').write_text(Path('a').read_text() + Path(sys.argv[1]).read_text())"
    first, second, third = stages()
    second = replace(second, commands=(f"-c {shlex.quote(code)} b.yaml",))
    monkeypatch.setattr(quickstart_module, "STAGES", (first, second, third))
    quickstart_module.main([])
    Path("b.yaml").write_text("2")
    capsys.readouterr()
    quickstart_module.main([])
    out = capsys.readouterr().out
    assert "[2/4] b: its recipe has changed, it starts anew" in out
    assert out.count("finished before, skipped") == 1
    assert Path("c").read_text() == "12!"


def test_a_finished_quickstart_stays_as_it_is(small: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    quickstart_module.main([])
    quickstart_module.main([])
    assert capsys.readouterr().out.count("finished before, skipped") == 3
    assert small[0] == small[1]
