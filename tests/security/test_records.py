"""Records, tables and features from anybody: what is no such thing is left out or refused, whatever its size."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mepa_ds.errors import UserError
from mepa_ds.evaluation.feature_spaces import StoredFeatures
from mepa_ds.evaluation.references import Reference
from mepa_ds.project import files as project_files
from mepa_ds.reports import records
from mepa_ds.reports.records import read_records
from mepa_ds.runtime.metrics import as_written, read_metrics
from mepa_ds.safety.reading import parse_array, parse_json
from mepa_ds.scaling.table import read_table
from mepa_ds.watching.frame import frame
from mepa_ds.watching.run import WatchedRun

GOOD = [json.dumps({"event": "train", "step": step, "loss": 1.5}) for step in (1, 2)]
STRANGE = [
    "[1]", "7", '"text"', "{}", "[" * 100_000, '{"event":"train","step":-3}', '{"event":"train","step":1e18}',
    '{"event":"train","step":' + "9" * 5000 + "}", '{"event":"train","step":"4"}', '{"event":7,"step":4}',
    '{"event":"train","step":4,"loss":1e999}', '{"event":"train","step":4,"loss":NaN}', '{"step": 1000000000000000000}',
]  # fmt: skip


def _run(folder: Path, lines: list[str]) -> Path:
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_strange_records_are_counted_and_told(tmp_path: Path) -> None:
    found = read_records(_run(tmp_path, [GOOD[0], *STRANGE, GOOD[1]]))
    assert found.steps.tolist() == [1, 2]
    assert any(f"{len(STRANGE)} lines" in note for note in found.notes)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl") if "step" in record] == [1, 2]
    (tmp_path / "status.json").write_text('{"state": "running", "num_steps": -4, "step": 1e999}')
    assert "step" not in str(frame([WatchedRun(tmp_path).look()], 80)).partition("\n")[0]


def test_records_without_number_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_MOST_EVENTS", 10)
    monkeypatch.setattr(records, "_MOST_COLUMNS", 20)
    events = [json.dumps({"event": "x", "step": 1})] * 25 + [json.dumps({"event": "routing", "step": 1})] * 25
    wide = [json.dumps({"event": "train", "step": 3 + n, **{f"k{n}_{k}": 1 for k in range(9)}}) for n in range(9)]
    found = read_records(_run(tmp_path, [*GOOD, *events, *wide]))
    assert (len(found.events), len(found.routing)) == (10, 10)
    assert len(found.train) <= 20
    assert any("30 records" in note for note in found.notes)
    assert any("left out" in note and "numbers" in note for note in found.notes)


def test_readers_of_records_that_lack_a_number_say_so(tmp_path: Path) -> None:
    record: dict[str, float] = {}
    with pytest.raises(UserError, match="not as a run"), as_written(tmp_path):
        record["ce"]


def test_a_pipe_for_a_log_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == []
    WatchedRun(tmp_path).look()


def test_tables_have_bounds(tmp_path: Path) -> None:
    pd.DataFrame({"loss": np.ones(6_000_000, np.int8)}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("a," * 10_000 + "b\n" + "\n" * 1000)
    for name in ("a.parquet", "a.csv"):
        with pytest.raises(UserError, match="cells"):
            read_table(tmp_path / name)


def test_a_features_file_that_says_more_than_it_has_takes_no_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3), np.float32))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data.replace(b"(2, 3)", b"(999999999999, 3)").replace(b" " * 14, b" " * 3, 1))
    with pytest.raises(UserError, match=r"a\.npy"):
        StoredFeatures(tmp_path / "a.npy", tmp_path / "a.npy")
    np.save(tmp_path / "wide.npy", np.ones((2, 9000), np.float32))
    with pytest.raises(UserError, match="square"):
        StoredFeatures(tmp_path / "wide.npy", tmp_path / "wide.npy")


def test_a_reference_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("mu.npy", "w") as file:
        for _ in range(300):
            file.write(bytes(1 << 20))
    with pytest.raises(UserError, match="times the file"):
        Reference(tmp_path / "a.npz")


def test_a_projects_file_names_files_beside_it(tmp_path: Path) -> None:
    for files in ({"../../etc/passwd": "0"}, ["a"], {"/dev/zero": "0"}):
        content = {"version": 1, "asked": {}, "images": {}, "choices": {}, "files": files}
        (tmp_path / "project.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="files"):
            project_files.read(tmp_path)


@pytest.mark.parametrize("text", ["1e999", "-1e999", "NaN", "9" * 400, "9" * 9000, '"\\ud800"', "[" * 200 + "]" * 200])
def test_json_that_others_cannot_read_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="it "):
        parse_json('{"a": ' + text + "}")


def test_text_beyond_unicode_is_no_array() -> None:
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    header += b"{'descr': '<U1', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    assert parse_array(header + "a".encode("utf-32-le")).tolist() == ["a"]
    for code in (0x110000, 0xD800, 2**32 - 1):
        with pytest.raises(ValueError, match="not Unicode"):
            parse_array(header + code.to_bytes(4, "little"))
