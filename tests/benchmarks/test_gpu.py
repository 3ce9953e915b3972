"""benchmarks/gpu.py: every line of it runs on a CPU; limits, kills and mistakes lose one command at most."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tyro

from benchmarks.gpu_parts.commands import FULL, Command, commands_of
from tests.benchmarks.importing import load_benchmark
from tests.tiny_run import ROOT

# A machine with a GPU may have little besides PyTorch: what gpu.py runs may not need these.
ABSENT = (
    "scipy", "pandas", "matplotlib", "timm", "wandb", "pyarrow", "sklearn", "lpips", "torch_fidelity", "tensorboard",
)  # fmt: skip
WITHOUT_THEM = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_spec(name, *rest):
    return None if name.partition(".")[0] in {ABSENT} else find(name, *rest)

PathFinder.find_spec = staticmethod(find_spec)
"""


def results_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "gpu.jsonl").read_text().splitlines()]


def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_THEM)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    log = (tmp_path / "gpu.log").read_text()
    assert ended.returncode == 0, ended.stdout + ended.stderr + log
    found = results_of(tmp_path)
    assert found == [json.loads(line) for line in ended.stdout.splitlines()]
    assert [result["part"] for result in found if "command" in result] == list(FULL)
    checks = [result for result in found if result["part"] == "B" and "ok" in result]
    assert len(checks) == 10
    assert all(check["ok"] for check in checks)
    figures = {(result["part"], result.get("name")): result for result in found}
    assert figures["A", "copy"]["ms"] > 0
    assert set(figures["C", "parts"]) >= {"inputs", "forward", "backward", "update"}
    assert figures["C", "memory"]["planned"] > 0
    assert figures["F", "prefixes"]["error"] == 0
    assert sum("failed" in result for result in found) == 1, "FlexAttention has no gradient on a CPU"
    by_model = [result for result in found if result["part"] in "DEGH" and "command" not in result]
    assert [result["part"] for result in by_model] == list("DEGH")


@pytest.mark.parametrize("part", FULL)
def test_the_commands_for_a_gpu_are_understood(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands_of(part, "cuda", tiny=False):
        module = load_benchmark(command.program.removesuffix(".py"), monkeypatch)
        json_option = ("--json", "figures.json") if command.has_json else ()
        options = tyro.cli(module.Options, args=[*command.arguments, *json_option])
        if hasattr(options, "contenders"):
            known = getattr(module, "ALL", None) or module.Options.contenders
            assert set(options.contenders) <= set(known)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    module = load_benchmark("gpu", monkeypatch)
    monkeypatch.setattr(module, "HERE", tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield module
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(gpu: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch, commands: list[Command], budget: int) -> Any:
    """Runs commands of our own as part A, and returns the exit code."""
    monkeypatch.setattr(gpu, "commands_of", lambda *_: commands)
    words = ["gpu.py", "--out", str(out), "--device", "cpu", "--only", "a", "--budget", str(budget)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return ended.value.code


def test_a_command_loses_only_itself(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One hangs, with a child of its own, after its first result; one fails; one writes its figures."""
    (tmp_path / "gpu_parts").mkdir()
    (tmp_path / "gpu_parts" / "hangs.py").write_text(
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        'print(\'{"name": "first", "pid": %d}\' % child.pid, flush=True)\n'
        "print('words', flush=True)\ntime.sleep(600)\n"
    )
    (tmp_path / "gpu_parts" / "fails.py").write_text("print('{no JSON}')\nraise SystemExit(3)\n")
    (tmp_path / "writes.py").write_text(
        "import pathlib, sys\npathlib.Path(sys.argv[sys.argv.index('--json') + 1]).write_text('{\"ms\": 7}')\n"
    )
    hangs, fails = Command("gpu_parts/hangs.py", (), 5.0), Command("gpu_parts/fails.py", ("--of", "two words"), 30.0)
    code = run(gpu, tmp_path, monkeypatch, [hangs, fails, Command("writes.py", (), 15.0)], budget=50)
    assert code == 1
    machine, first, hung, failed, wrote, ended = results_of(tmp_path)
    assert machine["part"] == "machine"
    assert first["name"] == "first"
    assert hung["ended"] == "out of time"
    assert 5 <= hung["seconds"] < 30
    assert (
        not Path(f"/proc/{first['pid']}").exists() or "Z" in Path(f"/proc/{first['pid']}/stat").read_text().split()[2]
    )
    assert (failed["ended"], failed["status"]) == ("failed", 3)
    assert failed["command"] == "gpu_parts/fails.py --of 'two words'"
    assert wrote == {"part": "A", "ms": 7}
    assert ended["ended"] == "ok"
    log = (tmp_path / "gpu.log").read_text()
    assert "words\n" in log
    assert "{no JSON}\n" in log


def test_what_does_not_fit_the_budget_is_left_out(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(gpu, tmp_path, monkeypatch, [Command("none.py", (), 100.0)], budget=3) == 0
    assert results_of(tmp_path)[1] == {"part": "A", "command": "none.py", "ended": "not started"}


def test_a_signal_ends_the_command_that_runs(gpu: ModuleType) -> None:
    running = gpu.Running()
    process = running.start(["sleep", "600"], dict(os.environ))
    started = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert process.wait(30) == -signal.SIGKILL
    assert time.monotonic() - started < 50


def test_mistakes(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(tmp_path), "--only", "a,X"])
    with pytest.raises(SystemExit, match="--only: X: expected some of A, B"):
        gpu.main()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="no CUDA device; --device cpu --tiny"):
        gpu.main()


def test_a_failed_check_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checks = load_benchmark("gpu_parts/checks", monkeypatch)

    def wrong(device: Any) -> dict[str, Any]:
        raise AssertionError("values differ")

    monkeypatch.setattr(checks, "CHECKS", {"one": wrong, "two": lambda device: {"error": 0.5}})
    monkeypatch.setattr("sys.argv", ["checks.py", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        checks.main()
    assert ended.value.code == 1
    one, two = map(json.loads, capsys.readouterr().out.splitlines())
    assert (one["ok"], one["failed"]) == (False, "AssertionError: values differ")
    assert (two["ok"], two["error"]) == (True, 0.5)
