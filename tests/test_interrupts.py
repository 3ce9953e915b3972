"""Signals that ask a command to end: a line that says how to go on, and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mepa_ds import interrupts

WAITING = """
import signal, sys
from mepa_ds.command_line import entry
def main():
    try:
        print("ready", flush=True)
        signal.pause()
    finally:
        print("in order", flush=True)
        while "stubborn" in sys.argv:
            signal.pause()
entry.run(main)
"""
SLOW_MODULE = "print('ready', flush=True)\nimport signal\nsignal.pause()\n"


def start(folder: Path, program: str, *words: str) -> subprocess.Popen[str]:
    script = folder / "program.py"
    script.write_text(program)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "RANK"))}
    process = subprocess.Popen(
        [sys.executable, str(script), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_is_a_line_with_the_command_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    with start(tmp_path, WAITING, "a word") as process:
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
    assert printed == "in order\n"
    first, second = errors.splitlines()
    assert first == f"stopped ({number.name}); what is complete is kept. To go on, start again:"
    assert second.endswith(f"{tmp_path}/program.py 'a word'")
    assert process.returncode == 128 + number


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    with start(tmp_path, WAITING, "stubborn") as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "in order\n"
        while process.poll() is None:  # those within the tenth of a second after the first are the same request
            process.send_signal(signal.SIGINT)
        assert process.returncode == 128 + signal.SIGINT
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_an_interrupt_amid_an_import_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text(SLOW_MODULE)
    program = "from mepa_ds.command_line import entry\ndef main(): import slow_module\nentry.run(main)"
    with start(tmp_path, program) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("stopped (SIGINT)")
    assert errors.count("\n") == 2


def test_the_commands_import_nothing_slow_before_they_can_be_interrupted() -> None:
    program = "import sys, mepa_ds.cli.main, mepa_ds.interrupts; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_nohup_stays_nohup(monkeypatch: pytest.MonkeyPatch) -> None:
    assert signal.SIGHUP in interrupts.handled()
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    assert interrupts.handled() == (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def test_the_command_to_go_on_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    above = {
        9: (["/usr/bin/python", "-m", "torch.distributed.run", "--nproc-per-node", "2", "pretrain.py", "a b.yaml"], 5),
        5: (["bash", "-i"], 1),
    }
    monkeypatch.setattr(interrupts, "_words_of", lambda pid: above[pid][0] if pid in above else [])
    monkeypatch.setattr(interrupts, "_parent_of", lambda pid: above[pid][1])
    monkeypatch.setattr(interrupts.shutil, "which", lambda name: {"python": "/usr/bin/python"}.get(name))
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "-u", "pretrain.py", "a b.yaml"])
    monkeypatch.setattr(os, "getppid", lambda: 9)
    assert interrupts.command_line() == "python -m torch.distributed.run --nproc-per-node 2 pretrain.py 'a b.yaml'"
    monkeypatch.setattr(os, "getppid", lambda: 5)
    assert interrupts.command_line() == "python -u pretrain.py 'a b.yaml'"
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "/bin/mepa", "sample"])
    monkeypatch.setattr(interrupts.shutil, "which", lambda name: f"/bin/{name}")
    assert interrupts.command_line() == "mepa sample"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert interrupts.to_go_on() == "", "a job's scripts start it again"
