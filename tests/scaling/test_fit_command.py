"""`mepa scale fit`: tables from elsewhere and of studies, what it writes and prints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mepa_ds.cli.scale.fit import main
from mepa_ds.errors import UserError
from mepa_ds.scaling.fit_files import read_fits
from mepa_ds.scaling.laws import FitOptions, fit_chinchilla, fit_power
from mepa_ds.scaling.report.analysis import rows_for
from mepa_ds.scaling.report.rows import envelope, finished
from tests.scaling.synthetic_study import law, plan_study, write_runs


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with none of our columns."""
    n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e6, 1e9, 4), np.geomspace(1e8, 1e11, 4)))
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(len(n)))
    losses = noise * np.array([law(*pair) for pair in zip(n, d, strict=True)])
    path = tmp_path_factory.mktemp("foreign") / "runs.csv"
    pd.DataFrame({"Model Size": n, "Training Tokens": d, "nats": losses}).to_csv(path, index=False)
    return path


COLUMNS = ["--n", "Model Size", "--d", "Training Tokens", "--loss", "nats"]


def test_a_foreign_table(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(foreign), *COLUMNS, "--draws", "100"])
    table = pd.read_csv(foreign)
    fit = fit_chinchilla(table["Model Size"], table["Training Tokens"], table["nats"], options=FitOptions(draws=100))
    entry = read_fits(foreign.parent / "fits.json")["laws"]["chinchilla"]
    assert entry.fit.parameters == fit.parameters
    assert entry.fit.intervals == fit.intervals
    printed = capsys.readouterr().out
    assert "chinchilla: 16 runs; inputs Model Size, Training Tokens" in printed
    assert f"{fit.alpha:.6g}" in printed
    assert f"objective huber, summed: {fit.objective:.9g}; {fit.starts_at_optimum} of 64 starts reached it" in printed


def test_pinned_and_held_out(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "pinned.json"
    main(
        [str(foreign), *COLUMNS, "--draws", "0", "--e", "2.0", "--tied", "--hold-out", "3", "15", "--json", str(target)]
    )
    document = read_fits(target)
    fit = document["laws"]["chinchilla"].fit
    assert fit.E == 2.0
    assert fit.alpha == fit.beta
    assert fit.num_rows == 14
    assert [one["run"] for one in document["hold_out"]["chinchilla"]] == ["3", "15"]
    assert capsys.readouterr().out.count("held out, law chinchilla: ") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--law", "data", "--e", "2"], "--e belongs to power, chinchilla, link, not to data"),
        (["--law", "power", "--free-experts"], "--free-experts belongs to routed, joint-moe"),
        (["--hold-out", "77"], "--hold-out 77: no such number of a row in the table of 16 rows"),
        (["--n", "Size"], "Size"),
        (["--law", "routed"], "experts"),
    ],
)
def test_refusals(foreign: Path, arguments: list[str], message: str) -> None:
    given = COLUMNS if "--n" not in arguments else COLUMNS[2:]
    with pytest.raises(UserError, match=message):
        main([str(foreign), *given, "--draws", "0", *arguments])


def test_a_studys_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is collected first; the law of size and data sees dense runs alone, power the envelope."""
    moe = [{"num_experts": 8, "top_k": 3, "expert_ratio": 1.0}]
    grids = {
        "dense": {"sizes": ["d2w48", "d3w64", "d4w96"], "samples": [6400, 12800, 25600]},
        "moe": {"sizes": ["d2w48"], "moe": moe, "samples": [25600]},
    }
    study = plan_study(tmp_path, grids=grids, lr={"rule": "fixed", "peak": 2e-3}, seeds=None)
    write_runs(study)
    main([str(study.output_dir), "--law", "chinchilla", "power", "--draws", "0"])
    table = pd.read_parquet(study.output_dir / "table.parquet")
    laws = read_fits(study.output_dir / "fits.json")["laws"]
    dense = table[(table["kind"] == "dense") & (table["role"] == "fit")]
    assert sorted(laws["chinchilla"].runs) == sorted(dense["run"])
    assert set(rows_for(table, "chinchilla")["kind"]) == {"dense"}
    front = envelope(finished(dense))
    fit = fit_power(front["flops_model"], front["loss"], options=FitOptions(draws=0))
    assert laws["power"].fit.parameters == fit.parameters
    printed = capsys.readouterr().out
    assert "over the envelope; inputs flops_model" in printed
    assert "held out, law chinchilla: d6w192-n51200: measured" in printed
    assert "C counted: alpha" in printed
    main([str(study.output_dir / "table.csv"), "--draws", "0", "--json", str(tmp_path / "csv.json")])
    other = read_fits(tmp_path / "csv.json")["laws"]["chinchilla"].fit
    assert other.parameters == laws["chinchilla"].fit.parameters
