"""The table of a study: a row for each run, of its last weights, with what is missing left missing."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from mepa_ds.errors import UserError
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.scaling.columns import COLUMNS
from mepa_ds.scaling.running.collect import SCORES_NAME, collect
from mepa_ds.scaling.running.members import member_of, set_stale_aside
from mepa_ds.scaling.running.status import format_status, status_rows
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.plan import read_plan
from tests.scaling.synthetic_study import plan_study, write_runs

BEST, LAST = 1.0, 3.0


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    study = plan_study(tmp_path_factory.mktemp("study"))
    states = {"d2w48-n6400": "failed", "d3w64-n6400": "diverged", "d4w96-n6400": "planned"}
    write_runs(study, states)
    return study


def run_of(study: StudyConfig, name: str) -> Path:
    return study.output_dir / "runs" / name


def test_losses_are_those_of_the_last_weights(study: StudyConfig) -> None:
    """Also where an earlier evaluation was better, as `best` would have it."""
    path = run_of(study, "d2w48-n12800") / "metrics.jsonl"
    records = list(read_metrics(path))
    earlier = {**records[-1], "step": 7, "ce": BEST, "best": True}
    path.write_text(
        "".join(json.dumps(record) + "\n" for record in [*records[:-1], earlier, {**records[-1], "ce": LAST}])
    )
    row = collect(study).set_index("run").loc["d2w48-n12800"]
    assert row["loss"] == LAST
    assert row["weights_step"] == row["steps"]


def test_every_run_has_a_row_with_its_state(study: StudyConfig) -> None:
    table = collect(study).set_index("run")
    assert len(table) == len(read_plan(study))
    found = {name: table.loc[name, "status"] for name in ("d2w48-n6400", "d3w64-n6400", "d4w96-n6400", "d4w128-n6400")}
    assert list(found.values()) == ["failed", "diverged", "running", "finished"]
    assert table.loc[["d2w48-n6400", "d3w64-n6400", "d4w96-n6400"], "loss"].isna().all()
    assert table["params_matrix"].notna().all()
    assert list(table.columns[: len(COLUMNS) - 1]) == list(COLUMNS)[1:]


def test_experts_and_repeats_are_counted(study: StudyConfig) -> None:
    table = collect(study).set_index("run")
    dense, moe = table.loc["d3w64-n25600"], table.loc["d3w64-e8k3x1s1-n25600"]
    assert (dense["kind"], dense["experts"], dense["granularity"]) == ("dense", 0, 1.0)
    assert (moe["kind"], moe["experts"], moe["top_k"], moe["expert_hidden"], moe["granularity"]) == ("moe", 8, 3, 64, 4)
    assert moe["params_total"] > moe["params_active"] > moe["params_matrix"]
    assert (table["epochs"] == table["samples"] / table["unique_images"]).all()
    assert (table["tokens"] == 30 * table["samples"]).all()


def test_scores_of_images_join_the_table(study: StudyConfig) -> None:
    scores = {"fid": 12.5, "inception_score": 3.0, "num_samples": 5}
    (run_of(study, "d4w128-n51200") / SCORES_NAME).write_text(json.dumps(scores))
    table = collect(study).set_index("run")
    assert (table.loc["d4w128-n51200", "fid"], table.loc["d4w128-n51200", "is"]) == (12.5, 3.0)
    assert "num_samples" not in table.columns
    assert pd.isna(table.loc["d4w96-n51200", "fid"])


def test_a_finished_run_without_its_last_score_is_refused(study: StudyConfig) -> None:
    path = run_of(study, "d4w128-n12800") / "metrics.jsonl"
    whole = path.read_text()
    path.write_text("".join(line for line in whole.splitlines(keepends=True) if '"heldout"' not in line))
    with pytest.raises(
        UserError, match=r"d4w128-n12800: is finished, but metrics.jsonl has no held-out score of step 200"
    ):
        collect(study)
    path.write_text(whole)


def test_status_has_a_line_a_run(study: StudyConfig) -> None:
    members = [member_of(row) for row in read_plan(study)]
    lines = format_status(members).splitlines()
    assert len(lines) == len(members) + 1
    told = {line.split()[0]: line.split()[1] for line in lines[:-1]}
    assert told["d3w64-n6400"] == "diverged"
    assert told["d4w96-n6400"] == "planned"
    assert "it has failed" in next(line for line in lines if line.startswith("d2w48-n6400 "))
    assert lines[-1].startswith(f"{len(members)} runs: ")
    assert {row["state"] for row in status_rows(members)} == {"finished", "failed", "diverged", "planned"}


def test_a_run_of_another_recipe_is_set_aside(study: StudyConfig) -> None:
    """To resume from it would give the old run's loss under the new recipe's name."""
    row = next(row for row in read_plan(study) if row["run"] == "d4w96-n12800")
    assert member_of(row).state == "finished"
    assert set_stale_aside(row) is None
    resolved = run_of(study, "d4w96-n12800") / "resolved.yaml"
    before = resolved.read_text()
    resolved.write_text(before.replace("weight_decay: 0.05", "weight_decay: 0.1"))
    assert member_of(row).state == "planned"
    aside = set_stale_aside(row)
    assert aside == run_of(study, "d4w96-n12800.before1")
    assert not resolved.exists()
    assert collect(study).set_index("run").loc["d4w96-n12800", "status"] == "running"
    aside.rename(resolved.parent)
    resolved.write_text(before)
