"""A run's log is read once, whatever state it is in; what cannot be read is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mepa_ds.errors import UserError
from mepa_ds.reports.records import read_records
from mepa_ds.runtime.metrics import read_metrics
from tests.reports.made_up import records_of_a_run, tokenizer_records, write_run


def test_columns_events_and_routing_equal_the_file(tmp_path: Path) -> None:
    run = write_run(tmp_path, records_of_a_run(30))
    found, expected = read_records(run), list(read_metrics(run / "metrics.jsonl"))
    trained = [record for record in expected if record["event"] == "train"]
    assert found.kind == "pretraining"
    assert found.notes == []
    for name in ("step", "loss", "ce", "images", "grad_norm"):
        np.testing.assert_array_equal(found.train[name], [record[name] for record in trained])
    np.testing.assert_array_equal(found.train["ce_scale/3"], [record["ce_scale"][2] for record in trained])
    assert set(found.train["own_seconds_slowest"]) == {0.2}
    assert found.events == [record for record in expected if record["event"] not in ("train", "routing")]
    assert found.routing_records(found.routing[3:5]) == [r for r in expected if r["event"] == "routing"][3:5]


def test_a_tokenizers_run(tmp_path: Path) -> None:
    assert read_records(write_run(tmp_path, tokenizer_records())).kind == "tokenizer"


def test_torn_and_foreign_lines_are_left_out_and_told(tmp_path: Path) -> None:
    run = write_run(tmp_path, records_of_a_run(5))
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + lines[1][:40])
    found = read_records(run)
    assert len(found.steps) == 5
    assert found.notes == [
        "the last line of metrics.jsonl is cut short (the run was killed, or is writing now): it is left out"
    ]
    path.write_bytes(b"".join([lines[0], b"\xff\x00garbage\n", b"[1, 2]\n", b'{"step": 3}\n', *lines[1:]]))
    found = read_records(run)
    assert len(found.steps) == 5
    assert found.notes == ["3 lines of metrics.jsonl (number 2, 3, 4) hold no record: left out"]


def test_numbers_that_are_not_finite_or_missing_are_gaps(tmp_path: Path) -> None:
    records = [
        {"event": "train", "step": 1, "loss": 2.0},
        {"event": "train", "step": 2, "loss": "nan", "mfu": 0.5, "ce_scale": [1.0, "inf"]},
        {"event": "train", "step": 3, "loss": "inf", "mfu": None},
    ]
    found = read_records(write_run(tmp_path, records)).train
    np.testing.assert_array_equal(found["loss"], [2.0, np.nan, np.inf])
    np.testing.assert_array_equal(found["mfu"], [np.nan, 0.5, np.nan])
    np.testing.assert_array_equal(found["ce_scale/2"], [np.nan, np.inf, np.nan])


def test_steps_that_are_not_in_order(tmp_path: Path) -> None:
    records = [{"event": "train", "step": step, "loss": float(n)} for n, step in enumerate([1, 2, 3, 2, 4])]
    found = read_records(write_run(tmp_path, records))
    assert found.steps.tolist() == [1, 2, 3, 4]
    assert found.train["loss"].tolist() == [0.0, 3.0, 2.0, 4.0], "the later record of a step counts"
    assert "1 training records stand behind later ones" in found.notes[0]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (None, r"metrics\.jsonl: no training is recorded there; give the output_dir of a pretraining or tokenizer run"),
        ([], r"no training is recorded there yet; the run has not begun its steps"),
        ([{"event": "start", "step": 0}], r"yet: the run has started, .* log\.every steps; failed: out of memory"),
    ],
)
def test_a_run_that_never_logged(tmp_path: Path, records: list[dict[str, object]] | None, message: str) -> None:
    if records is not None:
        write_run(tmp_path, records)
        (tmp_path / "status.json").write_text(json.dumps({"state": "failed", "error": "out of memory"}))
    with pytest.raises(UserError, match=message):
        read_records(tmp_path)
