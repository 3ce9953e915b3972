"""`mepa watch`: what a run's files say, while they grow, are cut, written anew, or are not there."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from mepa_ds.cli.tools import watch
from mepa_ds.errors import UserError
from mepa_ds.runtime.metrics import MetricsWriter
from mepa_ds.runtime.run_lock import RunLock
from mepa_ds.watching import tail
from mepa_ds.watching.frame import frame
from mepa_ds.watching.run import WatchedRun
from mepa_ds.watching.tail import MetricsTail
from tests.tiny_run import ROOT


def train(step: int, **values: Any) -> dict[str, Any]:
    return {"event": "train", "step": step, "epoch": 0.5, "loss": 4.0 - step / 100, "ce": 3.0, **values}


def status(run: Path, state: str, **facts: Any) -> None:
    run.mkdir(exist_ok=True)
    (run / "status.json").write_text(json.dumps({"state": state, **facts}))


def text_of(*paths: Path) -> str:
    return frame([WatchedRun(path).look() for path in paths], 200).plain


def test_only_new_records_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", None)
    for step in range(1, 2001):
        writer.write(train(step))
    monkeypatch.setattr(tail, "_FIRST_BYTES", 2000)
    reader = MetricsTail(tmp_path / "metrics.jsonl")
    records, anew = reader.read()
    assert (records[-1]["step"], len(records) < 40, anew) == (2000, True, True)
    assert reader.read() == ([], False)
    writer.write(train(2001))
    writer.write({"event": "routing", "step": 2001, "layers": {}})
    assert reader.read() == ([train(2001)], False)


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    path, reader = tmp_path / "metrics.jsonl", MetricsTail(tmp_path / "metrics.jsonl")
    assert reader.read() == ([], True), "not there yet"
    line = json.dumps(train(1))
    path.write_text(line[:20])
    assert reader.read() == ([], True)
    path.write_text(f"{line}\nno json\n[1]\n{line}\n")
    assert reader.read()[0] == [train(1), train(1)], "torn lines are left out"


def test_a_rollback_and_a_resume_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer, reader = MetricsWriter(path, None), MetricsTail(path)
    for step in (1, 2, 3):
        writer.write(train(step))
    assert len(reader.read()[0]) == 3
    writer.rewind(1, keep_warnings=True)
    for step in (2, 3, 4):  # longer than before when it is looked at next
        writer.write(train(step, loss=1.0))
    records, anew = reader.read()
    assert ([record["step"] for record in records], anew) == ([1, 2, 3, 4], True)
    MetricsWriter(path, 2)
    assert [record["step"] for record in reader.read()[0]] == [1, 2]


def test_states_and_numbers_of_runs(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    running = tmp_path / "running"
    status(running, "running", step=60, num_steps=120, seconds_left=65)
    writer = MetricsWriter(running / "metrics.jsonl", None)
    more = {"guidance_cosine": 0.5, "max_expert_share": 0.25, "images_per_second": 640.0}
    writer.write({"event": "heldout", "step": 10, "ce": 3.25})
    for step in range(10, 60, 10):
        writer.write(train(step, **more))
    writer.write({"event": "loss_spike", "step": 55, "message": "the loss of 9 is far above the recent ones"})
    shown = text_of(running)
    assert "running  running  step 60/120  ━━━━━━━━━━━━━━━───────────────" in shown.removeprefix(str(tmp_path) + "/")
    for part in (
        " 50%  1:05 left",
        "epoch 0.50  loss 3.5000  ce 3.0000  held-out 3.2500  cosine 0.500  expert 25%  640 images/s",
        "loss █▆▅▃▁  3.9000 → 3.5000",
        "warning at step 55: the loss of 9 is far above the recent ones",
    ):
        assert part in shown
    os.utime(running / "status.json", (0, 0))
    assert "killed" in text_of(running), "no lock, and nothing written for long"
    status(tmp_path / "failed", "failed", step=3, num_steps=4, error="of rank 1\nUserError: full")
    status(tmp_path / "stopped", "requeue", step=3, num_steps=4)
    (tmp_path / "empty").mkdir()
    shown = text_of(*(tmp_path / name for name in ("failed", "stopped", "empty", "none")))
    assert [line.split()[1:3] for line in shown.splitlines() if line.startswith(str(tmp_path))] == [
        ["failed", "step"], ["stopped", "step"], ["not", "started"], ["not", "there"]
    ]  # fmt: skip
    assert "of rank 1 UserError: full" in shown
    lock.release()


def test_a_tokenizers_run_and_numbers_that_json_lacks(tmp_path: Path) -> None:
    status(tmp_path / "run", "finished", step=2, num_steps=2)
    writer = MetricsWriter(tmp_path / "run/metrics.jsonl", None)
    writer.write({"event": "heldout", "step": 1, "psnr": 21.5})
    writer.write({"event": "train", "step": 2, "loss": float("nan"), "codebook_use": 0.5})
    assert "loss nan  held-out 21.50 dB  codes 50%" in text_of(tmp_path / "run")


def test_an_output_that_is_no_terminal_gets_one_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status(tmp_path / "run", "finished", step=2, num_steps=2)
    watch.main([str(tmp_path / "run"), str(tmp_path / "none")])
    out = capsys.readouterr().out
    assert "finished  step 2/2" in out
    assert "\x1b" not in out
    for words, message in (([], "give the output_dir"), ([str(tmp_path / "run/status.json")], "is a file")):
        with pytest.raises(UserError, match=message):
            watch.main(words)


def test_a_terminal_is_followed_until_ctrl_c(tmp_path: Path) -> None:
    """A run that starts and goes on while it is watched."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, "-m", "mepa_ds", "watch", str(tmp_path / "run"), "--every", "0.1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    for name in ("COLUMNS", "LINES"):  # another terminal's, which a test's process may have
        environment.pop(name, None)
    process = subprocess.Popen(command, env=environment, stdout=inner, stderr=inner)
    os.close(inner)
    try:
        await_text(outer, "not there")
        status(tmp_path / "run", "running", step=1, num_steps=4)
        await_text(outer, "step 1/4")
        MetricsWriter(tmp_path / "run/metrics.jsonl", None).write(train(2))
        await_text(outer, "loss 3.9800")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(outer)


def await_text(terminal: int, text: str, seconds: float = 60.0) -> None:
    seen, end = "", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < end, seen
        seen += os.read(terminal, 65536).decode(errors="replace")
