"""From study files to runs: grids, seeds, sweeps, branches, costs, refusals and warnings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mepa_ds.config.base import load_config, read_yaml, validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.errors import UserError
from mepa_ds.objective.flops import forward_flops
from mepa_ds.runtime.schedule import learning_rate, peak_lr
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.plan import make_plan, plan_facts, read_plan, read_study, study_hash, write_plan
from mepa_ds.scaling.study.points import points_of
from tests.scaling.study.studies import study_of, study_values
from tests.tiny_run import ROOT

MOE = {"num_experts": 4, "top_k": 2, "expert_ratio": 1.0}


def names(folder: Path, **changes: Any) -> list[str]:
    return [point.name for point in points_of(study_of(folder, **changes))]


def test_grids_are_multiplied_out(tmp_path: Path) -> None:
    grid = {"sizes": ["d1w16", "d1w32"], "samples": [80, 160], "moe": [None, MOE], "unique_images": [None, 10]}
    assert len(names(tmp_path, grids={"all": grid})) == 16
    assert "d1w32-e4k2x1s1-n160-u10" in names(tmp_path, grids={"all": grid})


def test_seeds_repeat_points_of_the_grids(tmp_path: Path) -> None:
    found = names(tmp_path, seeds={"count": 3, "at": {"sizes": ["d1w16"], "samples": [80]}})
    assert found[9:] == ["d1w16-n80-seed1", "d1w16-n80-seed2"]
    with pytest.raises(UserError, match=r"seeds.at: d1w64-n80 is in no grid"):
        names(tmp_path, seeds={"count": 3, "at": {"sizes": ["d1w64"], "samples": [80]}})


def test_a_sweep_shares_the_run_at_the_grids_rate(tmp_path: Path) -> None:
    sweep = {"sizes": ["d1w16", "d1w32"], "samples": [80], "factors": [0.5, 1, 2]}
    fixed = names(tmp_path, lr={"rule": "fixed", "peak": 1e-3, "sweep": sweep})
    assert fixed[9:] == ["d1w16-n80-lr0.5", "d1w16-n80-lr2", "d1w32-n80-lr0.5", "d1w32-n80-lr2"]
    tuned = names(tmp_path, lr={"rule": "tuned", "peak": 1e-3, "sweep": sweep})
    assert len(tuned) == 15, "the grid's runs get the tuned rate, which the sweep's middle one is not"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grids": {"a": {"sizes": ["d1w16"], "samples": [80]}, "b": {"sizes": ["d1w16"], "samples": [80, 160]}}},
         "grids.b: the run d1w16-n80 is the same as one of a"),
        ({"hold_out": {"sizes": ["d2w48"], "samples": [80]}}, "hold_out: the run d2w48-n80 is the same as one of"),
        ({"grids": {"dense": {"sizes": ["d1w16"], "samples": [80, 160, 240, 320, 400, 480]}}},
         "chinchilla cannot be fitted to one size; give more grids.*.sizes"),
        ({"grids": {"dense": {"sizes": ["d1w16", "d1w32", "d1w48", "d2w48", "d3w48", "d3w64"], "samples": [80]}}},
         "chinchilla cannot be fitted to one length; give more grids.*.samples"),
        ({"grids": {"dense": {"sizes": ["d1w16", "d1w32"], "samples": [80]}}}, "5 parameters, and the grids have 2"),
        ({"set": {"model.deepth": 3}}, "model.deepth: unknown key; did you mean 'depth'?"),
        ({"set": {"train.global_batch.x": 3}}, "train.global_batch.x: 'global_batch' is a value, not a section"),
        ({"set": {"optim.base_lr": 3.0}}, "set: optim.base_lr: the planner sets it for each run; use lr"),
        ({"set": {"model.moe.top_k": 3}}, r"set: model.moe.top_k: the planner sets it for each run; use grids.*.moe"),
        ({"grids": {"a": {"sizes": ["d1w16", "d2w48"], "samples": [80, 160, 320]},
                    "b": {"sizes": ["d1w16h1"], "samples": [81]}}}, "d1w16-n80 and d1w16h1-n81 are the same"),
        ({"grids": {"a": {"sizes": ["d1w16"], "samples": [3]}}}, "3 images are 0.375 steps of 8: rounded to whole"),
        ({"budget": {"flops_per_second": 1e6, "hours": 0.01}}, "device-hours, budget.hours is 0.01; the dearest run"),
        ({"laws": ["data"]}, "data has 7 parameters|data needs runs with fewer unique images"),
        ({"laws": ["joint-moe"]}, "joint-moe needs two numbers of experts"),
        ({"laws": ["isoflop"]}, "isoflop needs a grid of FLOP budgets"),
        ({"head_width": 64}, "the width 16 is no multiple of 64"),
    ],
)  # fmt: skip
def test_designs_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    wide = {"dense": {"sizes": ["d1w16", "d1w32", "d2w48"], "samples": [80, 160, 320, 640]}}
    with pytest.raises(UserError, match=message.replace(".*.", r"\.\*\.").replace("?", r"\?")):
        make_plan(study_of(tmp_path, **({"grids": wide} | changes)), with_memory=False)


def test_a_collinear_design_is_refused(tmp_path: Path) -> None:
    """Each size at one length that is in proportion to it: no fit can tell the two exponents apart."""
    grids = {}
    for width in (16, 32, 48, 64, 80, 96, 112):
        grids[f"w{width}"] = {"sizes": [f"d1w{width}"], "samples": [int(8 * width**1.8)]}
    with pytest.raises(UserError, match=r"log N and log D are collinear \(correlation (0.99|1.00)"):
        make_plan(study_of(tmp_path, grids=grids), with_memory=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grid": {}}, "grid: unknown key; did you mean 'grids'?"),
        ({"lr": {"rule": "power", "peak": 1e-3}}, "rule power needs lr.reference"),
        ({"lr": {"rule": "fixed", "peak": 1e-3, "exponent": 1.0}}, "lr.exponent belongs to rule power"),
        ({"lr": {"rule": "tuned", "peak": 1e-3}}, "rule tuned needs lr.sweep"),
        ({"grids": {"a": {"sizes": ["d1w16"]}}}, "give one of samples and flops"),
        ({"grids": {"a": {"sizes": ["x"], "samples": [1]}}}, "'x' is no size"),
        ({"schedule": {"kind": "lin0", "branches": True}}, "belong to kind wsd"),
        ({"schedule": {"kind": "wsd", "branches": True}}, "need schedule.warmup_steps"),
        ({"budget": {"device": "Z80"}}, "device: 'Z80' is not known"),
        ({"name": "a b"}, "name"),
    ],
)
def test_study_files_are_strict(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study_values(tmp_path, **values)))
    with pytest.raises(UserError) as caught:
        read_study(path)
    assert message in str(caught.value)


def test_recipes_say_what_the_study_says(tmp_path: Path) -> None:
    grids = {"dense": {"sizes": ["d1w16", "d2w48"], "samples": [80, 160, 330], "batch": [8, 16]}}
    study = study_of(tmp_path, grids=grids, set={"optim.weight_decay": 0.1}, lr={"rule": "fixed", "peak": 3e-3})
    plan = make_plan(study, with_memory=False)
    write_plan(plan)
    facts = plan_facts(plan)
    for run, row in zip(plan.runs, facts["runs"], strict=True):
        config = load_config(PretrainConfig, Path(row["recipe"]))
        assert config == run.config
        assert config.optim.weight_decay == 0.1
        assert peak_lr(config.optim, config.train.global_batch) == pytest.approx(3e-3), "whatever the batch"
        assert row["samples"] == (config.train.steps or 0) * config.train.global_batch
        assert row["flops"] == 3 * forward_flops(config.model) * row["samples"]
        assert abs(row["samples"] - (run.point.samples or 0)) <= config.train.global_batch / 2
        assert config.log.evaluate_every == config.train.steps
        assert config.guards.diverged_above == pytest.approx(1.5 * math.log(16))
    lines = (study.output_dir / "small.txt").read_text().split()
    assert lines == [row["recipe"] for row in facts["runs"]]
    assert read_plan(study) == json.loads(json.dumps(facts["runs"]))


def test_budgets_of_flops_give_each_size_its_length(tmp_path: Path) -> None:
    grid = {"sizes": ["d1w16", "d1w32", "d2w48"], "flops": [2e9, 4e9, 8e9]}
    plan = make_plan(study_of(tmp_path, grids={"iso": grid}, laws=["isoflop", "chinchilla"]), with_memory=False)
    for run in plan.runs:
        budget = run.point.flops
        assert budget is not None
        assert run.flops == pytest.approx(budget, rel=8 * run.image_flops / budget)


def test_a_power_rule_follows_the_size(tmp_path: Path) -> None:
    lr = {"rule": "power", "peak": 2e-3, "reference": "d1w16", "exponent": -0.5}
    plan = make_plan(study_of(tmp_path, lr=lr), with_memory=False)
    small, large = plan.runs[0], plan.runs[-1]
    assert small.lr_peak == pytest.approx(2e-3)
    assert large.lr_peak == pytest.approx(2e-3 * (large.counts.matrix / small.counts.matrix) ** -0.5)


def test_branches_pay_for_their_cooldown_alone(tmp_path: Path) -> None:
    """Lengths 1, 2, 4, 8 cost 8 + 0.2 (1 + 2 + 4) = 9.4 units, not 15; the trunk keeps the places to branch off."""
    grids = {"dense": {"sizes": ["d1w16", "d1w32"], "samples": [160, 320, 640, 1280]}}
    schedule = {"kind": "wsd", "warmup_steps": 4, "cooldown": 0.2, "branches": True}
    plan = make_plan(study_of(tmp_path, grids=grids, schedule=schedule), with_memory=False)
    family = plan.runs[:4]
    unit = family[0].flops
    assert sum(run.paid_flops for run in family) / unit == pytest.approx(9.4)
    assert [run.first_step for run in family] == [16, 32, 64, 0]
    trunk = family[3].config
    assert trunk.log.keep_steps == (16, 32, 64)
    for run in family[:3]:
        assert str(run.config.branch_from).endswith(f"{family[3].name}/checkpoints/step_{run.first_step:08d}")
        steps = range(run.first_step)
        ours, theirs = (
            [learning_rate(config.optim, run.batch, step, length) for step in steps]
            for config, length in ((run.config, run.steps), (trunk, family[3].steps))
        )
        assert ours == theirs


def test_what_changes_with_the_size_is_told_unless_pinned(tmp_path: Path) -> None:
    values = study_values(tmp_path)
    recipe = yaml.safe_load(Path(values["base"]).read_text())
    del recipe["model"]["drop_path"]
    Path(values["base"]).write_text(yaml.safe_dump(recipe))
    free = make_plan(validate(StudyConfig, values, ""), with_memory=False)
    assert any(line.startswith("drop_path grows with the depth") for line in free.warnings)
    pinned = make_plan(validate(StudyConfig, values | {"set": {"model.drop_path": 0.0}}, ""), with_memory=False)
    assert not any("drop_path" in line for line in pinned.warnings)


def test_an_output_dir_belongs_to_one_study(tmp_path: Path) -> None:
    write_plan(make_plan(study_of(tmp_path), with_memory=False))
    with pytest.raises(UserError, match="holds the study 'small', and this one is 'other'"):
        write_plan(make_plan(study_of(tmp_path, name="other"), with_memory=False))
    changed = study_of(tmp_path, set={"optim.weight_decay": 0.0})
    with pytest.raises(UserError, match="has changed since it was planned; run mepa scale plan again"):
        read_plan(changed)
    assert study_hash(study_of(tmp_path, budget={"price": 2.0})) == study_hash(study_of(tmp_path))
    with pytest.raises(UserError, match="not planned yet"):
        read_plan(study_of(tmp_path, output_dir=str(tmp_path / "new")))


def test_memory_that_a_run_needs_is_checked(tmp_path: Path) -> None:
    study = study_of(tmp_path, budget={"memory_gb": 0.001})
    with pytest.raises(UserError, match="run d1w16-n80 does not fit: a rank needs"):
        make_plan(study)


def test_useless_designs_are_seen_beforehand(tmp_path: Path) -> None:
    """The same design with little and with much noise between seeds."""
    grids = {"dense": {"sizes": ["d1w16", "d1w32", "d2w48", "d3w64"], "samples": [80, 320, 1280, 5120]}}
    prior = {"E": 2.0, "A": 30.0, "alpha": 0.35, "B": 300.0, "beta": 0.4}
    exact, noisy = (
        make_plan(study_of(tmp_path, grids=grids, prior=prior | {"noise": noise}), with_memory=False).expected
        for noise in (1e-4, 0.2)
    )
    assert exact["flags"] == []
    assert np.ptp(exact["ranges"]["alpha"]) < 0.05
    assert exact["ranges"]["alpha"][0] < 0.35 < exact["ranges"]["alpha"][1]
    assert len(noisy["flags"]) >= 1


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_can_be_planned(path: Path, tmp_path: Path) -> None:
    if "grids" not in read_yaml(path):
        pytest.skip("a recipe")
    study = read_study(path).model_copy(update={"output_dir": tmp_path / "study"})
    plan = make_plan(study, with_memory=False)
    assert len({run.name for run in plan.runs}) == len(plan.runs)
    assert set(plan.expected["ranges"]) == {"alpha", "beta", "a"}
