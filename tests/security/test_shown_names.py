"""Names out of strangers' files, as commands, figures, tables and cards show them."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mepa_ds.command_line.tables import aligned
from mepa_ds.data_tools.verify_shards import _print_histogram
from mepa_ds.images.sheets import draw_sheet
from mepa_ds.progress import Progress
from mepa_ds.reports import html, style
from mepa_ds.safety.text import cell
from mepa_ds.sweep.table import write_table
from mepa_ds.watching.frame import frame
from mepa_ds.watching.run import WatchedRun
from tests.security.hostile import CONTROL, NAME, assert_harmless

ROOT = Path(__file__).parents[2]


def mepa(*words: object, cwd: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "mepa_ds", *map(str, words)], capture_output=True, text=True, cwd=cwd, env=environment
    )
    return done.stdout + done.stderr


def test_members_of_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in (f"README{NAME}", f"0{NAME}.png", f"0{NAME}.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"0"))
    assert_harmless(mepa("data", "scan", tmp_path, cwd=tmp_path))


def test_records_and_status_of_a_run(tmp_path: Path) -> None:
    train = {"event": "train", "step": 1, "epoch": 0, "ce": 1.0, "loss": 1.0, "ce_last": 1.0, "images_per_second": 1.0,
             "peak_memory_bytes": 1}  # fmt: skip
    records = [
        {"event": "start", "step": 0, "precision": NAME, "device": NAME, NAME: NAME},
        train | {NAME: 1.0},
        {"event": f"odd{NAME}", "step": 1, "message": NAME},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "status.json").write_text(json.dumps({"state": NAME, "error": f"[link=x]{NAME}", "step": NAME}))
    assert_harmless(mepa("report", tmp_path, cwd=tmp_path))
    assert not CONTROL.search((tmp_path / "report.html").read_text())
    buffer = io.StringIO()
    Console(file=buffer, width=200, force_terminal=False).print(frame([WatchedRun(tmp_path).look()], 200))
    assert_harmless(buffer.getvalue())
    assert "[link=x]cat" in buffer.getvalue(), "markup is text"


def test_histograms_tables_and_bars(capsys: pytest.CaptureFixture[str]) -> None:
    _print_histogram(Counter({0: 1}), (NAME, NAME))
    with Progress(range(1), NAME) as bar:
        assert_harmless(bar.desc)
    assert_harmless(capsys.readouterr().out)
    assert_harmless("\n".join(aligned([["run"], [NAME]])))
    assert len(aligned([["run"], [NAME]])) == 2


def test_a_traceback_shows_names_as_text_and_no_secrets(tmp_path: Path) -> None:
    (tmp_path / "crash.py").write_text(
        "from mepa_ds.command_line import entry\n"
        "def main():\n"
        f"    raise KeyError('https://me:PASSWORD@host/x?sig=SIGNATURE') from RuntimeError({NAME!r})\n"
        "entry.run(main)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "crash.py"], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1
    assert_harmless(done.stderr)
    last = done.stderr.splitlines()[-1]
    assert last == "KeyError: 'https://host/x?...'", "where launchers look for the cause"
    assert "PASSWORD" not in last


def test_labels_of_figures(tmp_path: Path) -> None:
    """Dollars are no formulas, and what cannot be parsed as one is no error."""
    names = ["$", "$$", "costs $5", "$x$", "$\\frac{$", "\\$x$", "a$b$c$", NAME]
    with style.drawing():
        figure, (axes,) = style.new_figure(1, "$\\frac{$")
        for name in names:
            axes.plot([1, 2], [3, 4], label=name)
            axes.annotate(name, (1, 3))
        axes.set_title("$x_$")
        axes.set_yticks(range(len(names)), [style.plain(name, 24) for name in names])
        axes.set_xscale("log")
        axes.legend()
        style.save(figure, tmp_path / "figure")
    assert (tmp_path / "figure.svg").exists()


def test_a_caption_without_end_takes_no_time() -> None:
    began = time.process_time()
    tile = np.zeros((32, 32, 3), np.uint8)
    draw_sheet([[tile]], title="x" * 1_000_000, rows=["y " * 500_000], columns=[NAME])
    assert time.process_time() - began < 5


def test_spreadsheets_compute_nothing(tmp_path: Path) -> None:
    assert [cell(v) for v in ("=1+1", "@x", "-2.5", "+1e3", -1, None, "plain")] == [
        "'=1+1", "'@x", "-2.5", "+1e3", -1, None, "plain",
    ]  # fmt: skip
    write_table([{"model": '=HYPERLINK("x")', "seed": -1}], tmp_path)
    with open(tmp_path / "sweep.csv", newline="") as file:
        assert list(csv.reader(file)) == [["model", "seed"], ['\'=HYPERLINK("x")', "-1"]]


def test_pages_show_names_as_text() -> None:
    shown = html.text(f"</script>\"'{NAME} https://me:PASSWORD@host/x")
    assert not CONTROL.search(shown)
    assert not set("<>\"'") & set(shown)
    assert "PASSWORD" not in shown
