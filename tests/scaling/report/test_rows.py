"""Which rows count: the envelope, clusters, sweeps; and what is said of a comparison."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mepa_ds.reports.style import count, power
from mepa_ds.scaling.laws import noise_floor
from mepa_ds.scaling.report.hold_out import comparison, verdict
from mepa_ds.scaling.report.law_sections import named
from mepa_ds.scaling.report.rows import POINT, SAME_FLOPS, clusters, envelope, sweep_groups


def table(rows: list[dict[str, object]]) -> pd.DataFrame:
    same = dict.fromkeys(POINT, 1) | {"kind": "dense", "lr_peak": 1e-3, "seed": 0, "status": "finished", "role": "fit"}
    return pd.DataFrame([same | row for row in rows])


def test_envelope_is_what_a_double_loop_finds() -> None:
    rng = np.random.default_rng(0)
    rows = table([{"depth": k, "flops_model": f, "loss": v} for k, (f, v) in enumerate(rng.uniform(1, 9, (60, 2)))])
    kept = []
    for _, row in rows.iterrows():
        beaten = False
        for _, other in rows.iterrows():
            beaten |= other["flops_model"] <= SAME_FLOPS * row["flops_model"] and other["loss"] < row["loss"]
        if not beaten:
            kept.append(row["depth"])
    found = envelope(rows)
    assert sorted(found["depth"]) == sorted(kept)
    assert found["flops_model"].is_monotonic_increasing


def test_a_lucky_seed_is_not_on_the_envelope_alone() -> None:
    seeds: list[dict[str, object]] = [
        {"depth": 1, "flops_model": 1.0, "seed": k, "loss": loss} for k, loss in enumerate((2.0, 3.0, 4.0))
    ]
    found = envelope(table([*seeds, {"depth": 2, "flops_model": 0.5, "loss": 2.5}]))
    assert found["loss"].tolist() == [2.5]


def test_seeds_are_clusters_and_give_the_noise() -> None:
    rows = table([
        {"depth": 1, "seed": 0, "loss": 2.0}, {"depth": 1, "seed": 1, "loss": 2.2}, {"depth": 2, "loss": 3.0},
        {"depth": 1, "seed": 0, "loss": 2.4, "lr_peak": 2e-3},
    ])  # fmt: skip
    assert [int(c) for c in clusters(rows)] == [0, 0, 1, 2]
    deviation, freedom = noise_floor(rows["loss"], clusters(rows))
    assert freedom == 1
    assert deviation == pytest.approx(np.std(np.log([2.0, 2.2]), ddof=1))


def test_a_sweep_takes_the_grids_own_run() -> None:
    rows = table([
        {"loss": 2.0}, {"loss": 2.1, "lr_peak": 2e-3, "role": "lr"}, {"loss": 2.2, "lr_peak": 5e-4, "role": "lr"},
        {"loss": 2.0, "seed": 1}, {"depth": 5, "loss": 2.1, "lr_peak": 2e-3, "role": "lr"},
    ])  # fmt: skip
    (group,) = sweep_groups(rows)
    assert group["lr_peak"].tolist() == [5e-4, 1e-3, 2e-3]


@pytest.mark.parametrize(
    ("measured", "ends", "noise", "right", "words"),
    [
        (2.00, (1.9, 2.1), 0.001, True, "inside the predicted 95 % interval"),
        (2.50, (1.9, 2.1), 0.001, False, "OUTSIDE the predicted 95 % interval"),
        (
            2.11,
            (1.9, 2.1),
            0.02,
            True,
            "OUTSIDE the predicted 95 % interval, 1.9000 to 2.1000, and within 3 deviations",
        ),
        (2.50, None, 0.001, False, "no interval, and NOT within 3 deviations"),
        (2.50, None, None, None, "nothing says how much of it is noise"),
        (2.50, (1.9, 2.1), None, False, "OUTSIDE"),
    ],
)
def test_verdicts(
    measured: float, ends: tuple[float, float] | None, noise: float | None, right: bool | None, words: str
) -> None:
    found = comparison("d6", measured, 2.0, ends, noise)
    assert found["right"] is right
    assert words in verdict(found)


def test_flags_name_runs() -> None:
    flag = "Runs further than 5 deviations from the law, by row: 1 (-1.7%), 12 (+3.0%)."
    assert named(flag, ["a", "b"]) == "Runs further than 5 deviations from the law: b (-1.7%), 12 (+3.0%)."
    assert named("E is at 0: 1 (no row).", ["a", "b"]) == "E is at 0: 1 (no row)."


def test_counts_as_people_write_them() -> None:
    assert [count(v) for v in (7, 61440, 802816, 1.5e9, 2e12, 0.002)] == ["7", "61.4k", "803k", "1.5B", "2T", "2e-3"]
    assert [power(v) for v in (1e13, 2.5e-3, 1.234e20)] == ["1e13", "2.5e-3", "1.23e20"]
