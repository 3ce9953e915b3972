"""A bar in a terminal, lines in a file: no character that moves a cursor gets into a log."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from mepa_ds import progress
from mepa_ds.progress import Progress
from tests.tiny_run import ROOT

_BAR = "from mepa_ds.progress import Progress\nfor _ in Progress(range(3), 'reading'): pass"


def test_a_file_gets_whole_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(progress, "_FIRST_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    with Progress(total=4, desc="reading", unit="image", mininterval=0, miniters=1) as bar:
        for number in range(4):
            bar.update()
            bar.set_postfix(number=number)
        Progress.write("a line", file=file)
    lines = file.getvalue().splitlines()
    assert any(line.startswith("reading:  50% 2/4") for line in lines), lines
    assert "a line" in lines
    assert not set("\r\x1b") & set(file.getvalue())


def test_a_quick_command_writes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    assert list(Progress(iter(range(3)), "reading")) == [0, 1, 2]
    with Progress(total=4, disable=True) as bar:
        bar.update()
    assert file.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    outer, inner = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", _BAR], env=environment, stderr=inner, timeout=60, check=True)
    os.close(inner)
    assert "reading: 100%" in os.read(outer, 4096).decode()
    os.close(outer)
