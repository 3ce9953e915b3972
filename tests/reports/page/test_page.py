"""The page of runs: what it says, what it refuses, and, in a real browser, that everything on it works."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import yaml

from mepa_ds.cli.results.report import main
from mepa_ds.errors import UserError
from mepa_ds.reports.page.recipes import comparison_warnings, differences
from mepa_ds.reports.page.write import names_of, write_page
from mepa_ds.reports.records import read_records
from tests.browser import DESKTOP, PHONE, Browser
from tests.reports.made_up import records_of_a_run, tokenizer_records, train, write_run

EVIL = """</script><script>document.title = "broken"</script><img src=x onerror="document.title='broken'">"""
RECIPE = yaml.safe_dump({"seed": 0, "tokenizer": "tok", "train": {"steps": 600}, "name": EVIL, "quotes": "\"'`"})
PATIENCE = 60.0  # seconds: the machine may be busy
DRAWN = "return [...document.querySelectorAll('figure.chart')].every(one => one.dataset.drawn)"


def runs_of(tmp_path: Path, count: int = 2) -> list[Path]:
    """Runs of one recipe with other seeds; the first has a name and a message that would break a careless page."""
    found = []
    for number in range(count):
        records = records_of_a_run(60 if number == 0 else 40, number)
        records.append({"event": "loss_spike", "step": 600, "message": EVIL})
        recipe = RECIPE.replace("seed: 0", f"seed: {number}")
        found.append(write_run(tmp_path / f"run{number} <i>'\"", records, recipe, range(100, 601, 100)))
    return found


def page_of(runs: list[Path], out: Path) -> str:
    write_page([read_records(run) for run in runs], out)
    return out.read_text()


def test_the_command_writes_table_json_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = runs_of(tmp_path, 1)
    main([str(run)])
    printed = capsys.readouterr().out
    assert "heldout ce                     2" in printed
    assert f"page: {run / 'report.html'} (" in printed
    assert json.loads((run / "report.json").read_text())["steps"] == 600
    page = (run / "report.html").read_text()
    shown = (
        "Cross-entropy by scale",
        "2.00M",
        "said by rollback &lt;b&gt;&amp;",
        "optim.base_lr 0.001 -&gt; 0.0005",
        "2 replaced by others: a: cut short; b: empty",
        "a CPU",
        "mepa_ds 0.2, torch 2.10",
        "How to read this page",
    )
    for words in shown:
        assert words in page
    assert EVIL not in page
    assert not any(word in page.replace("http://www.w3.org", "") for word in ("http://", "https://"))


def test_several_runs_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = runs_of(tmp_path)
    main([*map(str, runs), "--out", str(tmp_path / "both.html")])
    assert str(tmp_path / "both.html") in capsys.readouterr().out
    page = (tmp_path / "both.html").read_text()
    assert "The runs differ in the seed (seed): the order of images" in page
    assert all((run / "report.json").exists() and not (run / "report.html").exists() for run in runs)


def test_without_the_charts_library_the_table_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    (run,) = runs_of(tmp_path, 1)
    with pytest.raises(
        UserError, match=r"the page needs the package vl-convert-python, .* pip install vl-convert-python"
    ):
        main([str(run)])
    assert "train ce" in capsys.readouterr().out
    assert (run / "report.json").exists()


def test_a_cut_log_is_told_in_the_terminal_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = runs_of(tmp_path, 1)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "step": 62')
    main([str(run)])
    assert f"note: {run}: the last line of metrics.jsonl is cut short" in capsys.readouterr().err


def test_what_cannot_be_shown_is_told(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, 1)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"event": "train", "step": 610, "loss": "nan", "grad_norm": "inf"}) + "\n")
        file.write('{"event": "train", "step": 62')
    (run / "samples/step_00000100.png").unlink()
    broken = run / "samples/step_00000200.png"
    broken.write_bytes(broken.read_bytes()[:200])
    (run / "samples/step_00000600.png").write_bytes(b"")
    (run / "resolved.yaml").write_text("seed: [")
    page = page_of([run], tmp_path / "page.html")
    for words in (
        "the last line of metrics.jsonl is cut short",
        "loss is not finite in 1 of 61 records, first at step 610",
        "grad_norm is not finite in 1 of 61",
        "Pictures samples/step_00000100.png that the log names are not there.",
        "Pictures samples/step_00000200.png, samples/step_00000600.png cannot be read as pictures",
        "so the page has no recipe of this run",
    ):
        assert words in page


def test_runs_of_two_kinds_are_refused(tmp_path: Path) -> None:
    runs = [*runs_of(tmp_path, 1), write_run(tmp_path / "tok", tokenizer_records())]
    with pytest.raises(
        UserError, match=r"run0.* is a pretraining run and .*tok trains a tokenizer: .* runs of one kind"
    ):
        page_of(runs, tmp_path / "page.html")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/page\.html: the page cannot be written there: .*; give --out FILE"):
        page_of([run], tmp_path / "file/page.html")


def test_every_number_of_a_record_is_in_a_chart(tmp_path: Path) -> None:
    """Those of versions to come too."""
    draw = np.random.default_rng(0)
    records = [train(step, draw, novelty=1.0, novel_list=[1.0, 2.0]) for step in range(10, 50, 10)]
    page = page_of([write_run(tmp_path, records)], tmp_path / "page.html")
    assert "Further numbers" in page
    assert "<h3>Novelty<span" in page
    assert "<h3>Novel list<span" in page


def test_what_runs_differ_in() -> None:
    one = {"seed": 0, "output_dir": "a", "tokenizer": "t", "optim": {"base_lr": 1e-3}, "data": {"heldout_tokens": "h"}}
    two = {"seed": 1, "output_dir": "b", "tokenizer": "u", "optim": {"base_lr": 2e-3}, "data": {"heldout_tokens": "g"}}
    found = differences(["a", "b"], [one, two])
    assert [key for key, _ in found] == ["data.heldout_tokens", "optim.base_lr", "seed", "tokenizer"]
    warned = " ".join(comparison_warnings(found, tokenizer_runs=False))
    for words in ("the schedule (optim.base_lr)", "the seed (seed)", "the tokenizer (tokenizer)", "the held-out set"):
        assert f"differ in {words}" in warned
    assert differences(["a", "b"], [one, {**one, "output_dir": "b"}]) == []
    assert "tokenizer" not in " ".join(comparison_warnings([("tokenizer.codebook_size", ["1", "2"])], True))


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "a/pretrain", tmp_path / "b/pretrain", tmp_path / "b/pretrain"]
    read = [read_records(write_run(path, records_of_a_run(2))) for path in paths]
    assert names_of(read[:1]) == ["pretrain"]
    assert names_of(read[:2]) == ["a/pretrain", "b/pretrain"]
    assert len(set(names_of(read))) == 3


def open_drawn(browser: Browser, page: Path, size: tuple[int, int], dark: bool = False) -> None:
    """Opens a page so tall that every chart comes into sight, waits for them, and gives it its size then."""
    browser.open(page, (size[0], 12_000), dark)
    browser.wait("return document.documentElement.dataset.ready", PATIENCE)
    browser.wait(DRAWN, PATIENCE)
    browser.resize(size)


def marks_of(browser: Browser) -> dict[str, int]:
    """How many drawn marks each chart has."""
    script = (
        "return Object.fromEntries([...document.querySelectorAll('figure.chart')].map(one => [one.id, "
        "one.querySelectorAll('.mark-line path, .mark-area path, .mark-rect path, .mark-symbol path').length]))"
    )
    found: dict[str, int] = browser.run(script)
    return found


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_everything_on_the_page_works(browser: Browser, tmp_path: Path, size: tuple[int, int]) -> None:
    """Of two overlaid runs on a desktop, and of one on a phone."""
    runs = runs_of(tmp_path, 2 if size == DESKTOP else 1)
    page_of(runs, tmp_path / "page.html")
    open_drawn(browser, tmp_path / "page.html", size)
    marks = marks_of(browser)
    assert len(marks) > 15
    assert all(marks.values()), marks
    assert browser.overflow() == 0
    title = browser.run("return document.title")
    assert "report" in title

    def text_of(selector: str) -> str:
        return str(browser.run(f"return document.querySelector({json.dumps(selector)}).textContent"))

    loss = "#chart-loss .drawing"
    for axis, words in (
        ("images", "images"),
        ("flops", "model FLOPs"),
        ("hours", "hours of training"),
        ("steps", "steps"),
    ):
        browser.click(f"input[value={axis}] + span")
        browser.click("#chart-loss h3")
        browser.wait(f"return document.querySelector('{loss}').textContent.includes('{words}')", PATIENCE)
    areas = "return document.querySelectorAll('#chart-loss .mark-area path').length"
    rules = "return document.querySelectorAll('#chart-loss .role-mark.mark-rule line').length"
    assert (browser.run(areas) > 0, browser.run(rules) > 0) == (True, True)
    for name in ("noise", "extremes", "events"):
        browser.click(f"#show-{name}")
    browser.click("#chart-loss h3")
    browser.wait(f"{areas} + {rules.removeprefix('return ')} === 0", PATIENCE)
    browser.click("#show-log")
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    browser.click("#theme")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") != background
    for selector in ("#picture-step", "#heat-step"):
        before = text_of("#heat-at") if selector == "#heat-step" else text_of("#picture-at")
        browser.run("const one = document.querySelector(arguments[0]); one.value = 0; "
                    "one.dispatchEvent(new Event('input'))", selector)  # fmt: skip
        assert text_of(selector.replace("step", "at")) != before
    assert browser.run("return document.querySelector('.picture img').naturalWidth") > 100
    browser.click("#picture-play")
    browser.wait("return document.querySelector('#picture-at').textContent !== '100'", PATIENCE)
    browser.run(
        "const one = document.getElementById('heat-layer'); one.value = '1'; one.dispatchEvent(new Event('change'))"
    )
    browser.click("#chart-ce_scale .legend button")
    browser.wait("return document.querySelector('#chart-ce_scale .legend button[aria-pressed=false]')", PATIENCE)
    if size == DESKTOP:
        select = "#chart-ce_scale select"
        browser.run(f"const one = document.querySelector('{select}'); one.selectedIndex = 0; "
                    "one.dispatchEvent(new Event('change'))")  # fmt: skip
        drag(browser)
    browser.click("summary")
    assert browser.overflow() == 0
    assert browser.problems() == []
    assert browser.run("return document.title") == title, "nothing of a recipe or a message has run"
    assert browser.run("return document.getElementById('trouble').hidden")


def drag(browser: Browser) -> None:
    """Numbers under the pointer; a part of the run enlarged, and the whole of it again."""
    from selenium.webdriver import ActionChains

    (plot,) = browser.find("#chart-loss .plot")
    browser.run("arguments[0].scrollIntoView({block: 'center'})", plot)
    ActionChains(browser.driver, duration=20).move_to_element(plot).perform()
    browser.wait("return !document.getElementById('tip').hidden", PATIENCE)
    assert "run0" in browser.run("return document.getElementById('tip').textContent")
    ActionChains(browser.driver, duration=20).click_and_hold(plot).move_by_offset(100, 0).release().perform()
    browser.wait("return !document.getElementById('whole').hidden", PATIENCE)
    browser.click("#whole")
    assert browser.run("return document.getElementById('whole').hidden")


def test_a_tokenizers_page_in_the_dark(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "tok", tokenizer_records())
    page_of([run], tmp_path / "page.html")
    open_drawn(browser, tmp_path / "page.html", DESKTOP, dark=True)
    assert all(marks_of(browser).values())
    assert "chart-psnr" in marks_of(browser)
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
    assert browser.problems() == []
