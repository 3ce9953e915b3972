"""`mepa sweep`: points, names, the plan, mistakes, the table; and one that trains."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mepa_ds.cli.tools import sweep as command
from mepa_ds.config.base import load_config, validate
from mepa_ds.errors import UserError
from mepa_ds.sweep.config import SweepConfig
from mepa_ds.sweep.plan import _name_of, make_plan, planned, read_sweep
from mepa_ds.sweep.table import table_of, write_table
from tests.scaling.study.studies import base_recipe
from tests.tiny_run import ROOT, make_run


def sweep_of(folder: Path, **changes: Any) -> SweepConfig:
    values = {
        "name": "small",
        "base": str(base_recipe(folder)),
        "output_dir": str(folder / "sweep"),
        "grid": {"optim.base_lr": [0.01, 0.02], "objective.balance_weight": [0.0, 0.1]},
    }
    return validate(SweepConfig, values | changes, "sweep.yaml")


def test_every_combination_with_every_seed(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, points=[{"train.steps": 7}, {"model.drop_path": 0.25}], seeds=2)
    rows, recipes = make_plan(sweep)
    assert len(rows) == 2 * 4 * 2
    assert rows[0]["run"] == "steps-7,base_lr-0.01,balance_weight-0.0-s0"
    config = recipes[rows[7]["run"]]
    assert (config.model.drop_path, config.optim.base_lr, config.objective.balance_weight) == (0.25, 0.02, 0.1)
    assert {recipes[row["run"]].seed for row in rows} == {config.seed, config.seed + 1}
    assert len({row["output_dir"] for row in rows}) == 16


def test_a_sweep_that_grows_keeps_its_runs(tmp_path: Path) -> None:
    before = {row["run"] for row in make_plan(sweep_of(tmp_path))[0]}
    more = {"optim.base_lr": [0.005, 0.01, 0.02], "objective.balance_weight": [0.0, 0.1]}
    assert before < {row["run"] for row in make_plan(sweep_of(tmp_path, grid=more))[0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {}}, "nothing is swept"),
        ({"grid": {"seed": [1]}}, "seed: is set by the sweep"),
        ({"grid": {"optim.base_lr": []}}, "at least 1"),
        ({"points": [{"optim.base_lr": 1.0}]}, "optim.base_lr: stands in grid and in points"),
        ({"grid": {"optim.base_lrr": [1.0]}}, "did you mean 'base_lr'"),
        ({"grid": {"optim.base_lr": [0.01, 0.010]}}, "is the same run as"),
        ({"grid": {"data.heldout_tokens": [None]}}, "compared on held-out images"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(sweep_of(tmp_path, **changes))


def test_long_and_odd_values_make_names_of_files(tmp_path: Path) -> None:
    points: tuple[dict[str, Any], ...] = (
        {"objective.alignment.scales": [2, 3]},
        {"model.moe": None},
        {"a.x": "../b c", "d.x": True},
        {},
    )
    names = ["scales--2,-3", "moe-null", "a.x--..-b-c-,d.x-true", "base"]
    assert [_name_of(point) for point in points] == names
    many = {f"optim.{key}": [0.01] for key in ("base_lr", "weight_decay", "warmup", "clip")}
    (row,) = make_plan(sweep_of(tmp_path, grid=many | {"model.depth": [2], "model.drop_path": [0.01]}))[0]
    assert len(row["run"]) <= 104
    assert "/" not in row["run"]


def test_the_table_is_sorted_by_the_heldout_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = sweep_of(tmp_path)
    planned(sweep).write_if_needed()
    rows = planned(sweep).rows()
    for row, ce in zip(rows[:2], (3.0, 2.0), strict=True):
        pretend_finished(row, ce)
    table = table_of(planned(sweep).fleet().members())
    assert [row["ce"] for row in table] == [2.0, 3.0, None, None]
    assert table[0]["run"] == rows[1]["run"]
    path = write_table(table, sweep.output_dir)
    written = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["objective.balance_weight"] for row in written[:2]] == ["0.1", "0.0"]
    assert json.loads((sweep.output_dir / "sweep.json").read_text()) == table
    command.main([str(sweep.output_dir), "--table-only"])
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:4] == ["optim.base_lr", "objective.balance_weight", "seed", "state"]
    assert f"table: {path}" in out
    with pytest.raises(UserError, match="holds the sweep 'small', and this one is 'other'"):
        planned(sweep_of(tmp_path, name="other")).write_if_needed()
    with pytest.raises(UserError, match="--nodes belongs to --slurm"):
        command.main([str(sweep.output_dir), "--nodes", "2"])


def pretend_finished(row: dict[str, Any], ce: float) -> None:
    folder = Path(row["output_dir"])
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text(Path(row["recipe"]).read_text())
    (folder / "status.json").write_text(json.dumps({"state": "finished", "step": row["steps"]}))
    records = [
        {"event": "train", "step": row["steps"], "mean_step_seconds": 0.5, "ce": ce},
        {"event": "heldout", "step": row["steps"], "ce": ce, "ce_last": ce, "accuracy": 0.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_shipped_sweep_is_valid() -> None:
    for path in sorted((ROOT / "recipes/sweeps").glob("*.yaml")):
        sweep = load_config(SweepConfig, path)
        assert len(make_plan(sweep)[0]) == 6


@pytest.mark.slow
@pytest.mark.processes
def test_one_command_trains_and_sorts(tmp_path: Path) -> None:
    make_run(tmp_path)
    base = base_recipe(tmp_path, train={"global_batch": 8, "steps": 3})
    values = {
        "name": "s",
        "base": str(base),
        "output_dir": str(tmp_path / "out"),
        "grid": {"optim.base_lr": [0.1, 1e-9]},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values))
    words = [sys.executable, "-m", "mepa_ds", "sweep", str(tmp_path / "sweep.yaml"), "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    end = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert end.returncode == 0, end.stdout + end.stderr
    rows = json.loads((read_sweep(tmp_path / "out").output_dir / "sweep.json").read_text())
    assert [row["optim.base_lr"] for row in rows] == [0.1, 1e-9], "it has learnt something"
