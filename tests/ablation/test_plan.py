"""From the file of an ablation to recipes: what is the same in all arms, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mepa_ds.ablation.plan import make_plan, planned, read_ablation
from mepa_ds.config.base import validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.scaling.running.members import member_of
from tests.ablation.studies import MOE, ablation_file, ablation_of


def test_arms_differ_in_what_they_set_and_in_nothing_else(tmp_path: Path) -> None:
    rows, recipes = make_plan(ablation_of(tmp_path))
    assert [row["run"] for row in rows[:4]] == ["dense-s0", "smoe-s0", "stmoe-s0", "dense-s1"]
    assert len({(row["steps"], row["samples"]) for row in rows}) == 1
    assert [row["seed"] for row in rows if row["arm"] == "smoe"] == [0, 1, 2]
    dense, smoe = (recipes[f"{arm}-s1"].model_dump(exclude={"output_dir"}) for arm in ("dense", "smoe"))
    moe = smoe["model"].pop("moe")
    assert (moe["router"], dense["model"].pop("moe")) == ("smoe", None)
    assert dense == smoe
    assert dense["log"]["evaluate_every"] == rows[0]["steps"]


def test_the_plan_on_disk_is_read_back_and_shared_by_its_folder(tmp_path: Path) -> None:
    file = ablation_file(tmp_path)
    ablation = read_ablation(file)
    planned(ablation).write_if_needed()
    rows = planned(read_ablation(ablation.output_dir)).rows()
    assert [member_of(row).state for row in rows] == ["planned"] * 9
    for row in rows:
        validate(PretrainConfig, yaml.safe_load(Path(row["recipe"]).read_text()), row["recipe"])
    manifest = (ablation.output_dir / "small.txt").read_text().splitlines()
    assert manifest == [row["recipe"] for row in rows]


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"model.moe": {**MOE, "expert_ratio": 4.0}}, "its active FLOPs are .* of dense's"),
        ({"model.moe": MOE}, "the arms stmoe and new are the same"),
        ({"train.steps": 3}, "train.steps must be the same in all arms"),
        ({"seed": 3}, "seed must be the same in all arms"),
        ({"model.router": "smoe"}, "model.router"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(tmp_path: Path, arm: dict[str, Any], message: str) -> None:
    values = ablation_of(tmp_path).model_dump(mode="json")
    arms = values["arms"] | {"new": {"title": "new", "set": arm}}
    with pytest.raises(UserError, match=message):
        make_plan(ablation_of(tmp_path, arms=arms))


def test_another_ablation_in_the_directory_is_refused(tmp_path: Path) -> None:
    planned(ablation_of(tmp_path)).write_if_needed()
    with pytest.raises(UserError, match="holds the ablation 'small'"):
        planned(ablation_of(tmp_path, name="other")).write_if_needed()
    with pytest.raises(UserError, match="has changed since it was planned"):
        planned(ablation_of(tmp_path, seeds=2)).rows()
    planned(ablation_of(tmp_path, seeds=2)).write_if_needed()
    assert len(planned(ablation_of(tmp_path, seeds=2)).rows()) == 6
    assert len(list((tmp_path / "ablation/recipes").iterdir())) == 6


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no arm 'full'; arms are dense, smoe, stmoe"):
        ablation_of(tmp_path, baseline="full")
    with pytest.raises(UserError, match="no arm 'full'"):
        ablation_of(tmp_path, compare=[["full", "dense"]])
    for compare in ([["smoe", "smoe"]], [["smoe", "stmoe"]] * 2):
        with pytest.raises(UserError, match=r"compare: smoe with .*: name two arms, and each pair once"):
            ablation_of(tmp_path, compare=compare)
