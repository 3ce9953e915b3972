"""From a table to fits, to their file and back."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mepa_ds.scaling
from mepa_ds.errors import UserError
from mepa_ds.scaling import FitOptions, exponents_by_count, fit_file, fit_table, read_fits, write_fits
from tests.scaling.runs import row, study

QUICK, SOME = FitOptions(draws=0), FitOptions(draws=100)


def test_a_table_gives_its_law() -> None:
    found = fit_table(study(), "chinchilla", options=QUICK)
    fit = found.fit
    assert found.left_out == {"role hold_out": ("n1e+08-d1.4e+09-s0",)}
    assert len(found.runs) == fit.num_rows == 16
    assert (fit.parameters["E"], fit.parameters["A"], fit.parameters["beta"]) == pytest.approx((2, 100, 0.35))
    foreign = study()[:16].rename(columns={"params_matrix": "size", "tokens": "seen", "loss": "nats"})
    foreign = foreign[["size", "seen", "nats"]]
    again = fit_table(foreign, "chinchilla", columns={"n": "size", "d": "seen", "loss": "nats"}, options=QUICK)
    assert again.fit == fit
    with pytest.raises(UserError, match="columns sizes are missing; there are size, seen, nats"):
        fit_table(foreign, "chinchilla", columns={"n": "sizes"})


def test_seeds_are_clusters_and_give_the_noise_floor() -> None:
    table = study(noise=0.01, seeds=3)
    found = fit_table(table, "chinchilla", options=SOME)
    assert found.noise_floor == pytest.approx(0.01, rel=0.3)
    order = np.random.default_rng(1).permutation(len(table))
    other = fit_table(table.iloc[order], "chinchilla", options=SOME)
    assert other.fit.intervals == found.fit.intervals
    renamed = table.assign(seed=table["seed"].map({0: 11, 1: 5, 2: 7}))
    assert fit_table(renamed, "chinchilla", options=SOME).fit == found.fit


@pytest.mark.parametrize("law", ["data", "isoflop", "routed", "joint-moe", "fine-grained-moe", "lr"])
def test_tables_that_do_not_serve_a_law_are_refused(law: str) -> None:
    """Dense runs of one epoch and one learning rate say nothing of experts, repeats, budgets or rates."""
    with pytest.raises(UserError, match=law):
        fit_table(study(), law, options=QUICK)


def test_a_power_law_of_runs_of_several_lengths_is_told_of() -> None:
    assert "several lengths" in fit_table(study(), "power", options=QUICK).notes[0]
    table = study()
    table = table[table["tokens"] > 1e9]
    found = fit_table(table, "power", options=QUICK)
    assert found.notes == ()
    assert found.fit.parameters["alpha"] == pytest.approx(0.3)


def test_settings_reach_the_fit_and_unknown_ones_are_refused() -> None:
    assert fit_table(study(), "chinchilla", options=QUICK, E=1.9).fit.parameters["E"] == 1.9
    with pytest.raises(UserError, match="tyed: this law has no such argument"):
        fit_table(study(), "chinchilla", tyed=True)
    with pytest.raises(UserError, match="the irreducible loss is needed"):
        fit_table(study().assign(fid=3.0), "link")
    with pytest.raises(UserError, match="law 'all': no such law"):
        fit_table(study(), "all")


def test_sweeps_of_the_learning_rate_are_rows_of_their_own_role() -> None:
    rates = np.geomspace(1e-4, 1e-2, 5)
    rows = [
        row(n, d, role="lr", lr_peak=rate, run=f"{n}-{d}-{rate}", loss=3 + np.log(rate / (0.1 * n**-0.3)) ** 2)
        for n in (1e6, 1e7, 3e7)
        for d in (1.4e8,)
        for rate in rates
    ]
    table = pd.concat([study(), pd.DataFrame(rows)], ignore_index=True)
    found = fit_table(table, "lr", options=QUICK)
    assert found.fit.parameters["a"] == pytest.approx(-0.3)
    assert found.fit.num_rows == 15


def test_exponents_under_every_count() -> None:
    found = exponents_by_count(study(), options=SOME)
    by_name = {(one["n"], one["c"]): one for one in found}
    assert list(by_name) == [
        (n, c) for n in ("params_matrix", "params_active", "params_total") for c in ("6ND", "counted")
    ]
    assert by_name["params_matrix", "6ND"]["a"] == pytest.approx(0.35 / 0.65)
    assert by_name["params_matrix", "counted"]["s"] == pytest.approx(1.05)
    assert by_name["params_matrix", "counted"]["a"] == pytest.approx(0.35 / (0.3 + 1.05 * 0.35))
    assert by_name["params_total", "6ND"]["alpha"] == pytest.approx(0.3 / 1.02)
    assert by_name["params_total", "counted"]["s"] == pytest.approx(1.05 / 1.02)
    for one in found:
        assert one["a_low"] <= one["a"] * (1 + 1e-9)


def test_fits_go_to_a_file_and_come_back_exactly(tmp_path: Path) -> None:
    study(noise=0.005).to_csv(tmp_path / "runs.csv", index=False)
    fits = fit_file(tmp_path / "runs.csv", ["chinchilla", "var"], options=SOME)
    write_fits(tmp_path / "fits.json", fits)
    again = read_fits(tmp_path / "fits.json")
    assert again["table"]["sha256"] == hashlib.sha256((tmp_path / "runs.csv").read_bytes()).hexdigest()
    direct = fit_table(study(noise=0.005), "chinchilla", options=SOME)
    assert again["laws"]["chinchilla"].fit == direct.fit
    assert again["laws"]["chinchilla"] == direct
    assert again["laws"]["var"].fit.tokens_of_scale == (1, 4, 9)
    held = again["hold_out"]["chinchilla"]
    assert held["inputs"]["N"] == [1e8]
    assert held["predicted"][0] == direct.fit.predict(1e8, 1.4e9)
    assert again["rolling"]["chinchilla"][-1]["inputs"]["N"] == [3e7] * 4
    assert again["left_out"] == {"role hold_out": ["n1e+08-d1.4e+09-s0"]}
    assert len(again["exponents_by_count"]) == 6


def test_what_is_no_file_of_fits(tmp_path: Path) -> None:
    for content, message in (
        ("{", "cannot be read"),
        ("[]", "no fits of version 1"),
        (json.dumps({"version": 1, "laws": {"power": {}}}), "an entry is damaged"),
    ):
        (tmp_path / "fits.json").write_text(content)
        with pytest.raises(UserError, match=message):
            read_fits(tmp_path / "fits.json")


def test_public_names_come_without_torch() -> None:
    code = (
        "import sys, mepa_ds.scaling as scaling; [getattr(scaling, name) for name in scaling.__all__]; "
        "print('torch' in sys.modules, 'deepspeed' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert found.stdout.split() == ["False", "False"]
    assert set(dir(mepa_ds.scaling)) == set(mepa_ds.scaling.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mepa_ds.scaling.nothing  # noqa: B018
