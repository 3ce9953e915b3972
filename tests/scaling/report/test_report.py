"""A study's report from end to end: the page shows what fits.json has, hides nothing and needs nothing else."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mepa_ds.cli.scale.predict import main as predict_main
from mepa_ds.cli.scale.report import main
from mepa_ds.errors import UserError
from mepa_ds.reports.html import short
from mepa_ds.scaling.columns import COLUMNS
from mepa_ds.scaling.laws import FITS, FitOptions
from mepa_ds.scaling.report.write import write_report
from mepa_ds.scaling.running.collect import collect
from mepa_ds.scaling.study.config import StudyConfig
from tests.scaling.synthetic_study import plan_study, write_runs

FAILED, DIVERGED, NOT_BEGUN = "d4w128-n6400", "d2w48-n6400", "d4w96-n6400"
FIGURES = {"laws", "compute", "experts", "residuals", "scales", "learning_rates"}


@dataclass
class Made:
    """A study and what the command wrote of it."""

    study: StudyConfig
    table: pd.DataFrame
    folder: Path
    printed: str

    @property
    def page(self) -> str:
        return (self.folder / "report.html").read_text()

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.folder / "fits.json").read_text())
        return document


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    study = plan_study(tmp_path_factory.mktemp("report"))
    write_runs(study, {FAILED: "failed", DIVERGED: "diverged", NOT_BEGUN: "planned"})
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([str(study.output_dir), "--draws", "100"])
    table = pd.read_parquet(study.output_dir / "table.parquet")
    return Made(study, table, study.output_dir / "report", printed.getvalue())


class Tags(HTMLParser):
    """All tags with their attributes, and the text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_table_has_all_columns(made: Made) -> None:
    assert set(COLUMNS) <= set(made.table.columns)


def test_numbers_on_the_page_are_those_of_the_json(made: Made) -> None:
    page, laws = made.page, {name: entry["fit"] for name, entry in made.document["laws"].items()}
    assert set(laws) == {"chinchilla", "power", "var", "routed", "joint-moe", "lr"}
    for name, law in laws.items():
        part = page[page.index(f'id="law-{name}"') :]
        part = part[: part.find("<h3", 1)]
        for key in FITS[law["law"]].parameter_names:
            for value in law[key] if isinstance(law[key], list) else [law[key]]:
                assert f'<span title="{value!r}">{short(value)}</span>' in part, (name, key)
        for key, ends in law["intervals"].items():
            for end in ends:
                assert f'title="{float(end)!r}"' in part, (name, key)
        if name != "lr":
            assert f"{law['objective']:.9g}; {law['starts_at_optimum']} of {law['num_starts']} starts" in part
    for count in made.document["exponents_by_count"]:
        for key in ("alpha", "beta", "a", "a_low", "a_high"):
            assert f'title="{count[key]!r}"' in page


def test_a_changed_json_changes_the_page(made: Made, tmp_path: Path) -> None:
    """So the laws on the page come from the file, not from a second fit or from text."""
    from mepa_ds.scaling.report.page import report_page

    document = made.document
    document["laws"]["chinchilla"]["fit"]["alpha"] = 0.123456789
    page = report_page({"study": "x"}, document, made.table, [], [])
    assert '<span title="0.123456789">0.1235</span>' in page


def test_runs_without_a_loss_are_named(made: Made) -> None:
    words = "".join(Tags(made.page).words)
    for text in (words, made.printed):
        assert f"1 of 34 runs have failed: {FAILED}." in text
        assert f"1 of 34 runs have diverged: {DIVERGED}." in text
        assert f"1 of 34 runs are not finished: {NOT_BEGUN}." in text
    runs = words[words.index("Runs without a final loss") :]
    assert all(name in runs for name in (FAILED, DIVERGED, NOT_BEGUN))
    assert all(name in runs for name in made.table["run"])
    assert all(name not in made.document["laws"]["chinchilla"]["runs"] for name in (FAILED, DIVERGED, NOT_BEGUN))


def test_the_page_is_self_contained(made: Made) -> None:
    tags = Tags(made.page).tags
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        for key in ("src", "href", "xlink:href", "data", "action"):
            value = attributes.get(key) or "#"
            assert value.startswith(("#", "https://arxiv.org/abs/")), (tag, key, value)
    assert "@import" not in made.page
    assert all(place.startswith("#") for place in re.findall(r"url\(([^)]*)\)", made.page))
    ids = [str(attributes["id"]) for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {str(a["xlink:href"])[1:] for _, a in tags if "xlink:href" in a} | {
        place[1:] for place in re.findall(r"url\(([^)]*)\)", made.page)
    }
    assert used <= set(ids)


def test_figures_are_png_and_svg(made: Made) -> None:
    assert {path.stem for path in made.folder.glob("*.png")} == FIGURES
    assert {path.stem for path in made.folder.glob("*.svg")} == FIGURES
    for name in FIGURES:
        with Image.open(made.folder / f"{name}.png") as image:
            assert min(image.size) > 500
            assert len(np.unique(np.asarray(image.convert("L")))) > 20
        assert f'id="figure-{name}"' in made.page


def test_hold_out_is_told_plainly(made: Made) -> None:
    (held,) = made.document["hold_out"]["chinchilla"]
    row = made.table.set_index("run").loc[held["run"]]
    law = made.document["laws"]["chinchilla"]["fit"]
    predicted = law["E"] + law["A"] * row["params_matrix"] ** -law["alpha"] + law["B"] * row["tokens"] ** -law["beta"]
    assert held["predicted"] == pytest.approx(predicted, rel=1e-12)
    assert held["error"] == pytest.approx(math.log(row["loss"] / predicted), rel=1e-9)
    assert held["deviations"] == pytest.approx(abs(held["error"]) / made.document["noise"]["deviation"])
    assert held["inside"] == (held["low"] <= row["loss"] <= held["high"])
    assert held["right"] == (held["inside"] or held["deviations"] <= 3)
    side = "inside" if held["inside"] else "OUTSIDE"
    assert f"{side} the predicted 95 % interval" in "".join(Tags(made.page).words)
    assert held["run"] not in made.document["laws"]["chinchilla"]["runs"]


def test_device_hours_are_those_really_used(made: Made) -> None:
    words = "".join(Tags(made.page).words)
    assert f"device-hours really used{31 * 36 / 3600:.4g}" in words.replace("\n", "")


def test_a_law_that_cannot_be_fitted_leaves_its_message(made: Made) -> None:
    one_size = made.table[(made.table["width"] == 64) & (made.table["kind"] == "dense")]
    one_size = one_size.drop(columns=[name for name in one_size if name.startswith("loss_scale_")])
    report = write_report(made.study.model_copy(update={"output_dir": made.folder / "reduced"}), *_at(made, one_size))
    page = "".join(Tags(report.page.read_text()).words)
    assert "chinchilla" in report.document["refused"]
    assert report.document["refused"]["chinchilla"] in page
    assert "E + A N^-alpha" in page
    assert "laws" in report.figures
    assert report.document["rolling"]["refused"] in page


def _at(made: Made, table: pd.DataFrame) -> tuple[pd.DataFrame, FitOptions]:
    folder = made.folder / "reduced"
    folder.mkdir()
    table.to_parquet(folder / "table.parquet")
    return table, FitOptions(draws=0)


def test_mixed_tokenizers_leave_no_law(made: Made, tmp_path: Path) -> None:
    """Their losses do not compare; the runs are listed all the same."""
    mixed = made.table.drop(columns=[name for name in made.table if name.startswith("loss_scale_")])
    mixed.loc[mixed["width"] == 64, "tokenizer_hash"] = "another"
    mixed.to_parquet(tmp_path / "table.parquet")
    report = write_report(made.study.model_copy(update={"output_dir": tmp_path}), mixed, FitOptions(draws=0))
    assert not report.document["laws"]
    assert set(report.document["refused"]) == {"chinchilla", "power", "routed", "joint-moe", "lr"}
    page = "".join(Tags(report.page.read_text()).words)
    for message in report.document["refused"].values():
        assert "tokenizer_hash: 2 different values" in message
        assert message in page


def test_the_prediction_reads_the_reports_fits(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    predict_main([str(made.study.output_dir), "--flops", "5e12", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] == str(made.folder / "fits.json")
    assert {candidate["size"] for candidate in found["candidates"]} == {"d2w48", "d3w64", "d4w96", "d4w128", "d6w192"}
    law = made.document["laws"]["chinchilla"]["fit"]
    for one in found["candidates"]:
        tokens = one["images"] * 30
        loss = law["E"] + law["A"] * one["params_matrix"] ** -law["alpha"] + law["B"] * tokens ** -law["beta"]
        assert one["loss"] == pytest.approx(loss, rel=1e-12)
        assert one["epochs"] == one["images"] / 12800
    predict_main(
        [str(made.study.output_dir), "--flops", "5e12", "--json", "--moe", "num_experts=8,top_k=3,expert_ratio=1"]
    )
    experts = json.loads(capsys.readouterr().out)
    assert experts["law"] == "joint-moe"
    assert {candidate["experts"] for candidate in experts["candidates"]} == {8}


def test_nothing_finished_is_refused(made: Made) -> None:
    with pytest.raises(UserError, match="no run has finished"):
        write_report(made.study, made.table.assign(status="running"), FitOptions(draws=0))


def test_isoflop_profiles(tmp_path: Path) -> None:
    """A study of FLOP budgets: the figure, and the minima of the law on the page."""
    budgets = [1e13, 3e13, 1e14]
    grid = {"sizes": ["d2w48", "d3w64", "d4w96", "d4w128", "d6w192"], "flops": budgets}
    ladder = {"sizes": ["d2w48", "d3w64"], "samples": [6400]}
    changes = {"grids": {"iso": grid, "ladder": ladder}, "laws": ["isoflop", "chinchilla"]}
    rates = {"rule": "fixed", "peak": 2e-3}
    study = plan_study(tmp_path, seeds=None, hold_out=None, lr=rates, **changes)
    write_runs(study)
    table = collect(study)
    table = table.drop(columns=[name for name in table if name.startswith("loss_scale_")])
    report = write_report(study, table, FitOptions(draws=0))
    law = report.document["laws"]["isoflop"]["fit"]
    page = report.page.read_text()
    assert "isoflop" in report.figures
    assert law["num_rows"] == 15
    assert len(law["minima"]) == 3
    for minimum in law["minima"]:
        if not minimum["why"]:
            assert f'title="{minimum["place"]!r}"' in page
    assert f'title="{law["surface_a"]!r}"' in page
    assert "No run was repeated" in page
    assert "No finished run is held out" in page
