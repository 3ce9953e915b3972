"""The report of an ablation, of runs that were never trained."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from mepa_ds.ablation.plan import planned
from mepa_ds.ablation.report import BEGIN, END, markdown_table, write_report
from mepa_ds.cli.results.ablate import main
from mepa_ds.errors import UserError
from tests.ablation.studies import ablation_file, ablation_of, pretend


def test_the_report_says_what_the_runs_measured(tmp_path: Path) -> None:
    ablation = ablation_of(tmp_path)
    pretend(ablation, {"stmoe": -0.5, "smoe": 0.01})
    text = write_report(ablation, planned(ablation).fleet().members()).read_text()
    assert "9 of 9 runs are finished: 3 arms, 3 seeds each" in text
    facts = json.loads((tmp_path / "ablation/report/ablation.json").read_text())["scores"]
    by_pair = {(d["arm"], d["against"]): d for d in facts["ce"]["differences"]}
    assert set(by_pair) == {("smoe", "dense"), ("stmoe", "dense"), ("stmoe", "smoe")}
    assert by_pair["stmoe", "dense"]["mean"] == pytest.approx(-0.5, abs=0.05)
    assert by_pair["stmoe", "dense"]["is_clear"]
    assert not by_pair["smoe", "dense"]["is_clear"]
    assert facts["load_variance"]["by_arm"]["stmoe"] == [2.0, 2.0, 2.0]
    row = next(line for line in text.splitlines() if line.startswith("| STMoE − dense"))
    assert row.count("**") >= 4, "cross-entropy and distance are clear"
    table = pd.read_csv(tmp_path / "ablation/report/table.csv")
    assert {"ce", "ce_scale_3", "patch-pca.fd", "class_agreement", "seconds"} <= set(table.columns)
    assert not {"patch-pca.fd_low", "step"} & set(table.columns)
    for name in ("differences", "scales", "load"):
        assert (tmp_path / f"ablation/report/{name}.png").stat().st_size > 5000


def test_runs_that_are_missing_are_named(tmp_path: Path) -> None:
    ablation = ablation_of(tmp_path)
    pretend(ablation, {})
    (tmp_path / "ablation/runs/smoe-s1/status.json").write_text(json.dumps({"state": "diverged", "step": 3}))
    text = write_report(ablation, planned(ablation).fleet().members()).read_text()
    assert "Not finished, and left out of everything below: smoe-s1 (diverged)." in text
    assert "8 of 9 runs" in text


def test_scores_of_two_protocols_are_not_mixed(tmp_path: Path) -> None:
    ablation = ablation_of(tmp_path)
    pretend(ablation, {})
    for run, reference in (("dense-s0", "one"), ("smoe-s1", "another")):
        path = tmp_path / f"ablation/runs/{run}/metrics.jsonl"
        path.write_text(path.read_text().replace('"protocol": {', f'"protocol": {{"reference": "{reference}", '))
    with pytest.raises(UserError, match=r"smoe-s1 and dense-s0 were scored in two ways \(reference differ\)"):
        write_report(ablation, planned(ablation).fleet().members())


def test_a_title_may_have_what_divides_cells() -> None:
    assert markdown_table(["a", "b"], [["x | y", "1"]])[-1] == r"| x \| y | 1 |"


def test_the_page_is_renewed_between_its_marks(tmp_path: Path) -> None:
    file, page = ablation_file(tmp_path), tmp_path / "docs/page.md"
    page.parent.mkdir()
    page.write_text(f"# Head\n\n{BEGIN}\nwhat was here\n{END}\n\ntail\n")
    pretend(ablation_of(tmp_path), {})
    for _ in range(2):
        main([str(file), "--report-only", "--write-into", str(page)])
    text = page.read_text()
    assert text.startswith("# Head\n")
    assert text.endswith("\n\ntail\n")
    assert "what was here" not in text
    assert text.count("**Mean ± standard deviation over seeds**") == 1
    assert (page.parent / "figures/ablation_small_differences.png").is_file()
    page.write_text("no marks")
    with pytest.raises(UserError, match="are not both there"):
        main([str(file), "--report-only", "--write-into", str(page)])


def test_without_a_finished_run_there_is_no_report(tmp_path: Path) -> None:
    file = ablation_file(tmp_path)
    with pytest.raises(UserError, match="no run is finished yet"):
        main([str(file), "--report-only"])


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(ablation_file(tmp_path)), "--dry-run"])
    output = capsys.readouterr().out
    assert "stmoe-s2" in output
    assert "9 runs," in output
    assert not (tmp_path / "ablation").exists()
