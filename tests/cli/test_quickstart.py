"""`mepa quickstart` from the first stage to the report, with a few steps of training, and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mepa_ds.config.base import apply_overrides, read_yaml
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
