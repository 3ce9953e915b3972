"""Stages: what runs again, what is skipped, and what earlier starts have left."""

from __future__ import annotations

import fcntl
import os
import pty
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mepa_ds.errors import UserError
from mepa_ds.interrupts import Interrupted
from mepa_ds.project.stages.display import Display, Expected, in_words
from mepa_ds.project.stages.processes import run_python
from mepa_ds.project.stages.run import Stage, StageRun, as_typed
from tests.tiny_run import ROOT


class Small:
    """Three stages that write what they have read. `totals`: seconds of b after every finished start."""

    def __init__(self, stages: tuple[Stage, ...]):
        self.stages, self.totals = stages, list[float]()

    def start(self) -> None:
        run = StageRun(self.stages, Path("progress.json"), "quickstart")
        run.run(lambda _, run: self.totals.append(run.spent["b"].seconds))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    monkeypatch.chdir(tmp_path)

    def stage(name: str, code: str) -> Stage:
        files = (Path(name),)
        code = f"from pathlib import Path; own = Path('{name}'); {code}"
        return Stage(name, name, (f"-c {shlex.quote(code)}",), files, files)

    fails = "import time; time.sleep(0.3); Path('broken').exists() and exit(3); "
    stages = (
        stage("a", "own.write_text(Path('version').read_text())"),
        stage("b", fails + "own.write_bytes(Path('a').read_bytes())"),
        stage("c", "own.write_bytes(Path('b').read_bytes() + b'!')"),
    )
    (tmp_path / "version").write_text("1")
    return Small(stages)


def test_a_stage_that_runs_again_takes_all_later_ones_with_it(small: Small) -> None:
    small.start()
    assert Path("c").read_text() == "1!"
    Path("a").unlink()
    Path("version").write_text("2")
    Path("broken").touch()
    with pytest.raises(UserError, match=r"stage b ended with status 3 .* start it again: it continues here"):
        small.start()
    assert not Path("c").exists()  # what was made of the old one
    Path("broken").unlink()
    small.start()
    assert Path("c").read_text() == "2!"
    assert small.totals[1] > small.totals[0] + 0.3  # of both starts


def test_a_stage_with_half_of_its_results_starts_anew(small: Small) -> None:
    """A tool that finds its own state finished may not make again what was deleted."""
    first, second, third = small.stages
    files = (Path("b"), Path("state"))
    code = "from pathlib import Path; Path('state').exists() or (Path('state').touch(), Path('b').write_text('b'))"
    second = replace(second, commands=(f"-c {shlex.quote(code)}",), outputs=files, results=files)
    small.stages = (first, second, third)
    small.start()
    Path("b").unlink()
    small.start()
    assert Path("b").read_text() == "b"


def test_a_changed_recipe_is_not_skipped(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    """The stage starts anew, without what it had made, and all later ones too."""
    Path("b.yaml").write_text("1")
    code = "from pathlib import Path; import sys; assert not Path('b').exists(); "
    code += "Path('b').write_text(Path('a').read_text() + Path(sys.argv[1]).read_text())"
    first, second, third = small.stages
    second = replace(second, commands=(f"-c {shlex.quote(code)} b.yaml",))
    small.stages = (first, second, third)
    small.start()
    Path("b.yaml").write_text("2")
    capsys.readouterr()
    small.start()
    out = capsys.readouterr().out
    assert "[2/4] b: its recipe has changed, it starts anew" in out
    assert out.count("finished before, skipped") == 1
    assert Path("c").read_text() == "12!"


def test_other_images_are_no_finished_stage(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = small.stages
    for images in ("30", "31"):
        small.stages = (replace(first, inputs=images), *others)
        small.start()
    assert "[1/4] a: its images or options have changed, it starts anew" in capsys.readouterr().out


_SAVES = """
import signal, sys, time
def end(*_):
    time.sleep(0.2)
    print("saved at step 7", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, end)
print("begun", flush=True)
time.sleep(30)
"""


def test_what_an_interrupted_command_says_last_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "saves.py").write_text(_SAVES)
    display = Display([Expected(1)], ["a"])
    display.has_bar = True  # so that lines go through this process

    def interrupt(*_: object) -> tuple[int, int, object]:
        while "begun" not in "".join(heard):
            time.sleep(0.01)
        raise Interrupted(signal.SIGTERM)

    heard = list[str]()
    monkeypatch.setattr(display, "say", heard.append)
    monkeypatch.setattr(os, "wait4", interrupt)
    with pytest.raises(Interrupted):
        run_python(str(tmp_path / "saves.py"), display)
    assert heard == ["begun", "saved at step 7"]


def test_what_is_finished_stays_as_it_is(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    small.start()
    small.start()
    assert capsys.readouterr().out.count("finished before, skipped") == 3
    assert small.totals[0] == small.totals[1]


@pytest.mark.parametrize(
    ("command", "typed"),
    [
        ("-m mepa_ds data build digits --out x", "mepa data build digits --out x"),
        ("-m mepa_ds sample --out x", "mepa sample --out x"),
        (
            "-m torch.distributed.run --nproc-per-node 2 -m mepa_ds data precompute tokens",
            "torchrun --nproc-per-node 2 -m mepa_ds data precompute tokens",
        ),
        ("-c pass", "python -c pass"),
    ],
)
def test_commands_are_shown_as_a_person_types_them(command: str, typed: str) -> None:
    assert as_typed(command) == typed


def test_the_share_done_is_that_of_the_runs_steps(tmp_path: Path) -> None:
    expected = Expected(100, tmp_path, 400)
    assert expected.share_done(50) == 0.5, "by the clock, until there is a record"
    (tmp_path / "metrics.jsonl").write_text('{"event": "start"}\n{"event": "train", "step": 300}\n{"step": 3')
    assert expected.share_done(1) == 0.75
    assert Expected(10).share_done(1000) == 0.95
    assert [in_words(seconds) for seconds in (40, 400, 12_000)] == ["40 s", "7 min", "3 h 20 min"]


def test_the_time_left_follows_the_machine() -> None:
    """Half as fast as planned so far, so it will be."""
    display = Display([Expected(100), Expected(60), Expected(240)], ["a", "b", "c"])
    assert display.begin(0, 0) == " (about 7 min left in all)"
    display.end(0, 200)
    assert display.begin(1, 0) == " (about 10 min left in all)"


_CHILD = (
    "import sys, time; print('a line', flush=True); sys.stderr.write('10%\\r20%\\r'); time.sleep(1.2); open('x', 'w')"
)
_BAR = """
from pathlib import Path
from mepa_ds.project.stages.display import Expected
from mepa_ds.project.stages.run import Stage, StageRun
stage = Stage("a", "first", ("child.py",), (Path("x"),), (Path("x"),), Expected(10))
StageRun((stage,), Path("progress.json"), "test").run(lambda place, _: print(place, "end"))
"""


def test_on_a_terminal_one_bar_stands_below_the_lines_of_all_stages(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(_CHILD)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    words, environment = [sys.executable, "-c", _BAR], os.environ | {"PYTHONPATH": str(ROOT)}
    for name in ("COLUMNS", "LINES"):  # another terminal's, which a test's process may have
        environment.pop(name, None)
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                said += os.read(ours, 1 << 16)
            except OSError:  # its other end is closed
                break
    os.close(ours)
    text = said.decode()
    assert process.returncode == 0, text
    for part in ("[1/2] a: first (about 10 s left in all)", "a line", "1/1 a |", " %, about ", "[2/2] end"):
        assert part in text, text
    assert "20%" not in text, "the command's own bar"
