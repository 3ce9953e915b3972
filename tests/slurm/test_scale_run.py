"""`mepa scale run --slurm` without a cluster: what it hands over, and what it leaves for later."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from mepa_ds.cli.results.ablate import main as ablate
from mepa_ds.cli.scale.run import main
from mepa_ds.errors import UserError
from mepa_ds.scaling.study.plan import read_plan, read_study
from tests import tiny_run
from tests.ablation.studies import ablation_file
from tests.scaling.study.studies import study_values
from tests.slurm import stand_ins


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in stand_ins.write(tmp_path).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "fake.env").write_text("MEPA_PARTITION=gpu\nMEPA_GPUS_PER_NODE=2\nMEPA_ACCELERATOR=cpu\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    tiny_run.make_run(tmp_path)
    return tmp_path


def write_study(cluster: Path, **changes: Any) -> Path:
    values = study_values(cluster, laws=["power"])
    values["grids"] = {"dense": {"sizes": ["d1w16", "d1w32"], "samples": [80, 160]}}
    values["set"] = {"data.features": None}
    path = cluster / "study.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def run(cluster: Path, study: Path) -> None:
    main([str(study), "--slurm", str(cluster / "fake.env"), "--limit", "3"])


def arrays(cluster: Path) -> list[str]:
    lines = (cluster / "submitted").read_text().splitlines()
    return [word for line in lines for word in line.split() if word.startswith("--array")]


def test_all_runs_are_one_array_and_finished_ones_are_left_out(cluster: Path) -> None:
    study = write_study(cluster)
    run(cluster, study)
    assert arrays(cluster) == ["--array=0-3%3"]
    rows = read_plan(read_study(study))
    assert (cluster / "study/small.txt").read_text().split() == [row["recipe"] for row in rows]
    for row in rows[:2]:
        directory = Path(row["output_dir"])
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "resolved.yaml").write_text(Path(row["recipe"]).read_text())
        (directory / "status.json").write_text(json.dumps({"state": "finished", "step": row["steps"]}))
    (cluster / "submitted").unlink()
    for job in cluster.glob("job-*"):
        job.unlink()
    run(cluster, study)
    assert arrays(cluster) == ["--array=0-1%3"]


def test_branches_wait_for_the_checkpoint_of_their_trunk(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = {"kind": "wsd", "warmup_steps": 2, "cooldown": 0.2, "branches": True}
    study = write_study(cluster, schedule=schedule)
    run(cluster, study)
    assert arrays(cluster) == ["--array=0-1%3"], "the two trunks"
    assert "2 runs wait for others" in capsys.readouterr().out


def test_an_ablation_is_one_array_too(cluster: Path) -> None:
    ablate([str(ablation_file(cluster, seeds=2)), "--slurm", str(cluster / "fake.env"), "--limit", "4"])
    assert arrays(cluster) == ["--array=0-5%4"]
    with pytest.raises(UserError, match="--limit belongs to --slurm"):
        ablate([str(cluster / "ablation.yaml"), "--limit", "4"])
