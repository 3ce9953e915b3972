"""The best size of the real family: counted FLOPs, whole steps, warnings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mepa_ds.cli.scale.predict import main
from mepa_ds.config.model import ModelConfig
from mepa_ds.errors import UserError
from mepa_ds.objective.flops import forward_flops_by_part
from mepa_ds.scaling.candidates import FamilyModel, family_models, study_models, study_sizes
from mepa_ds.scaling.family import VAR_DEPTHS
from mepa_ds.scaling.fit_files import VERSION
from mepa_ds.scaling.fits import TableFit
from mepa_ds.scaling.laws import ChinchillaFit, FitOptions, fit_chinchilla, fit_power
from mepa_ds.scaling.predict import Prediction, predict
from mepa_ds.scaling.study.config import StudyConfig
from mepa_ds.scaling.study.plan import read_plan, resolved
from mepa_ds.scaling.table import COLUMNS
from tests.scaling.synthetic_study import TRUTH, law, plan_study

SIZES = ("d2w48", "d3w64", "d4w96", "d4w128", "d6w192")
INPUTS = ("params_matrix", "tokens")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    return plan_study(tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="module")
def models(study: StudyConfig) -> list[FamilyModel]:
    return study_models(study, SIZES, None)


@pytest.fixture(scope="module")
def fit() -> ChinchillaFit:
    return _fit(100)


def _fit(draws: int) -> ChinchillaFit:
    n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(6e4, 3e6, 5), np.geomspace(2e5, 2e8, 5)))
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(len(n)))
    losses = noise * np.array([law(*pair) for pair in zip(n, d, strict=True)])
    return fit_chinchilla(n, d, losses, options=FitOptions(draws=draws))


def naive_best(models: list[FamilyModel], flops: float, parameters: dict[str, float], images_of: Any) -> str:
    """A loop over the sizes and a formula."""
    best, least = "", math.inf
    for model in models:
        tokens = images_of(model, flops) * model.image_tokens
        p = parameters
        loss = p["E"] + p["A"] * model.params_matrix ** -p["alpha"] + p["B"] * tokens ** -p["beta"]
        if loss < least:
            best, least = model.size, loss
    return best


def whole_steps(model: FamilyModel, flops: float) -> int:
    assert model.batch is not None
    steps = 0
    unit = model.batch * model.image_flops
    while (steps + 1) * unit <= flops:
        steps += 1
    return steps * model.batch


@pytest.mark.parametrize("flops", [3e11, 2e12, 1e13, 5e13])
def test_picks_the_least_loss_among_real_sizes(models: list[FamilyModel], fit: ChinchillaFit, flops: float) -> None:
    found = predict(fit, INPUTS, models, flops)
    assert found.best.model.size == naive_best(models, flops, fit.parameters, whole_steps)
    assert found.best.loss == min(candidate.loss for candidate in found.candidates)
    for candidate in found.candidates:
        assert candidate.images == whole_steps(candidate.model, flops)
        assert candidate.flops <= flops
        assert candidate.loss == fit.predict(candidate.model.params_matrix, candidate.images * 30)
        assert candidate.interval == fit.predict_interval(candidate.model.params_matrix, candidate.images * 30)
    assert sum(candidate.share_best or 0 for candidate in found.candidates) == pytest.approx(1)


def test_the_best_size_grows_with_the_budget(models: list[FamilyModel], fit: ChinchillaFit) -> None:
    best = [SIZES.index(predict(fit, INPUTS, models, flops).best.model.size) for flops in np.geomspace(1e12, 1e16, 9)]
    assert best == sorted(best)
    assert len(set(best)) > 2


def test_flops_of_an_image_are_the_counted_sum(study: StudyConfig, models: list[FamilyModel]) -> None:
    """Of all parts, with the head; and those of the plan."""
    rows = {row["size"]: row for row in read_plan(study) if row["kind"] == "dense"}
    for model in models:
        row = rows[model.size]
        parts = forward_flops_by_part(resolved(row).model)
        assert parts["head"] > 0
        assert model.image_flops == pytest.approx(3 * math.fsum(parts.values()), rel=1e-12)
        assert model.image_flops == pytest.approx(row["flops"] / row["samples"], rel=1e-12)


def test_leaving_the_head_out_would_change_the_answer() -> None:
    """With a large codebook the head is much of a small model, so that without it small ones look too cheap."""
    sizes = ("d2w128", "d3w128", "d4w192", "d6w256", "d8w384")
    models = family_models(sizes, None, {"codebook_size": 65536})
    share = {}
    for model in models:
        depth, width = (int(part) for part in model.size[1:].split("w"))
        config = ModelConfig(depth=depth, width=width, num_heads=width // 64, codebook_size=65536)
        parts = forward_flops_by_part(config)
        assert model.image_flops == 3 * sum(parts.values())
        share[model.size] = parts["head"] / sum(parts.values())
    assert max(share.values()) > 0.5
    truth = TRUTH
    fit, different = _exact(truth), 0
    for flops in np.geomspace(1e16, 1e18, 40):
        best = naive_best(models, flops, truth, lambda model, C: C / model.image_flops)
        mutated = naive_best(models, flops, truth, lambda model, C: C / (model.image_flops * (1 - share[model.size])))
        assert predict(fit, INPUTS, models, flops).best.model.size == best
        different += best != mutated
    assert different > 3


def _exact(p: dict[str, float]) -> ChinchillaFit:
    n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e5, 1e8, 5), np.geomspace(1e6, 1e12, 5)))
    losses = p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"]
    return fit_chinchilla(n, d, losses, options=FitOptions(draws=0))


def _told(found: Prediction) -> str:
    return " ".join(found.warnings)


def test_warns_of_extrapolation_repeats_and_ends(models: list[FamilyModel], fit: ChinchillaFit) -> None:
    small = predict(fit, INPUTS, models, 1e12, unique_images=10**9)
    assert "extrapolation" not in _told(small)
    assert "Each image" not in _told(small)
    far = predict(fit, INPUTS, models, 1e18, unique_images=12800)
    assert "largest of the sizes" in _told(far)
    assert "D = " in _told(far)
    assert "extrapolation" in _told(far)
    assert "Each image would be seen" in _told(far)
    assert far.best.epochs == far.best.images / 12800
    assert "smallest of the sizes" in _told(predict(fit, INPUTS, models[2:], 1e12))


def test_warns_of_a_law_without_intervals(models: list[FamilyModel]) -> None:
    found = predict(_fit(0), INPUTS, models, 1e13)
    assert found.best.interval is None
    assert found.best.share_best is None
    assert "no interval" in _told(found)


def test_says_what_it_leaves_out_and_refuses_no_step_at_all(models: list[FamilyModel], fit: ChinchillaFit) -> None:
    least = models[0].image_flops * 64
    found = predict(fit, INPUTS, models, 1.5 * least)
    assert [candidate.model.size for candidate in found.candidates] == ["d2w48"]
    assert "4 sizes are left out" in _told(found)
    with pytest.raises(UserError, match="no step of any of the 5 sizes"):
        predict(fit, INPUTS, models, 0.9 * least)
    with pytest.raises(UserError, match="above 0"):
        predict(fit, INPUTS, models, -1.0)


def test_refuses_a_law_of_columns_that_no_model_has(models: list[FamilyModel], fit: ChinchillaFit) -> None:
    with pytest.raises(UserError, match="column 'Training Tokens'"):
        predict(fit, ("params_matrix", "Training Tokens"), models, 1e13)


def test_refuses_a_law_of_compute_alone(models: list[FamilyModel]) -> None:
    """It gives all sizes the same loss."""
    compute = np.geomspace(1e12, 1e15, 8)
    law_of_compute = fit_power(compute, 2 + 100 * compute**-0.1, options=FitOptions(draws=0))
    with pytest.raises(UserError, match="choose one of chinchilla, data, joint-moe"):
        predict(law_of_compute, ["flops_model"], models, 1e13)


def test_vars_ladder_is_whole(tmp_path: Path) -> None:
    dense = {"dense": {"sizes": ["d8", "d12", "d16"], "samples": [6400, 12800, 25600]}}
    study = plan_study(tmp_path, grids=dense, seeds=None, hold_out=None, lr={"rule": "fixed", "peak": 1e-3})
    assert study_sizes(study) == tuple(f"d{depth}" for depth in VAR_DEPTHS)


def test_the_command(study: StudyConfig, fit: ChinchillaFit, capsys: pytest.CaptureFixture[str]) -> None:
    entry = TableFit("chinchilla", fit, COLUMNS, (), {}, None, ())
    document = {
        "version": VERSION, "table": {"path": "table.parquet", "sha256": ""}, "laws": {"chinchilla": entry.to_dict()},
        "refused": {"data": "data: no repeats"}, "unique_images": 12800,
    }  # fmt: skip
    with pytest.raises(UserError, match="run mepa scale report"):
        main([str(study.output_dir), "--flops", "1e13"])
    path = study.output_dir / "fits.json"
    path.write_text(json.dumps(document))
    main([str(study.output_dir), "--flops", "1.08e13", "--json"])
    by_flops = json.loads(capsys.readouterr().out)
    best = next(c for c in by_flops["candidates"] if c["size"] == by_flops["best"])
    assert best["loss"] == min(c["loss"] for c in by_flops["candidates"])
    assert (best["batch"], best["lr_peak"], best["steps"]) == (64, 2.0e-3, best["images"] // 64)
    assert best["epochs"] == best["images"] / 12800
    main([str(study.output_dir), "--gpu-hours", "0.1", "--json"])  # at 3e10 FLOPs a second, the study's
    assert json.loads(capsys.readouterr().out)["candidates"] == by_flops["candidates"]
    main([str(path), "--flops", "1.08e13"])
    text = capsys.readouterr().out
    assert f"best: {by_flops['best']}, {best['images']} images" in text
    assert sum(line.startswith("*") for line in text.splitlines()) == 1
    main([str(path), "--gpu-hours", "1", "--device", "H100", "--mfu", "0.5", "--json"])
    assert json.loads(capsys.readouterr().out)["flops"] == pytest.approx(3600 * 0.5 * 989e12)
    for wrong, message in (
        ([], "give one of --flops and --gpu-hours"),
        (["--flops", "1e13", "--law", "data"], "no repeats"),
        (["--gpu-hours", "1", "--device", "abacus"], "abacus"),
        (["--flops", "1e13", "--sizes", "large"], "large"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(path), *wrong])
