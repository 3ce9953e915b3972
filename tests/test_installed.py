"""From any directory, in a clone or installed."""

from __future__ import annotations

import os
import pkgutil
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mepa_ds.cli
from mepa_ds.cli import slurm
from mepa_ds.config.pretrain import ParallelConfig
from mepa_ds.engine import deepspeed_config
from mepa_ds.errors import UserError
from tests.tiny_run import ROOT


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(mepa_ds.cli.__path__)])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_every_module_of_the_command_line_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`torchrun -m mepa_ds.cli.train_tokenizer RECIPE` did nothing, and that with status 0."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"mepa_ds.cli.{name}", run_name="__main__", alter_sys=True)
    assert (end.value.code, "usage:" in capsys.readouterr().out) == (0, True)


def test_the_projects_knobs_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    default = ParallelConfig().deepspeed
    assert deepspeed_config.zero_stage(default) == 2
    assert deepspeed_config.zero_stage(Path("ds_configs/zero1.json")) == 1
    for path in ("ds_configs/zero9.json", "zero2.json", "other/ds_configs/zero2.json"):
        with pytest.raises(UserError, match=f"{tmp_path}/{path}: cannot read parallel.deepspeed: No such file"):
            deepspeed_config.read_knobs(Path(path))
    own = tmp_path / "ds_configs"
    own.mkdir()
    (own / "zero2.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert deepspeed_config.zero_stage(default) == 1, "the user's own comes first"
    (own / "zero2.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match="no UTF-8 text"):
        deepspeed_config.read_knobs(default)


def test_an_installed_package_has_the_projects_knobs(tmp_path: Path) -> None:
    """What setuptools would install, without a clone around it."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mepa_ds", "data_tools", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    setup = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build_py", "--build-lib", str(site)]
    subprocess.run(setup, cwd=source, capture_output=True, timeout=120, check=True)
    program = "import mepa_ds; from mepa_ds.config.pretrain import ParallelConfig; "
    program += "from mepa_ds.engine.deepspeed_config import zero_stage; "
    program += "print(zero_stage(ParallelConfig().deepspeed), mepa_ds.__file__)"
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", program]
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    end = subprocess.run(command, **options, timeout=120, check=False)
    assert end.stdout.split() == ["2", str(site / "mepa_ds/__init__.py")], end.stderr


def test_batch_jobs_are_a_clones_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "ROOT", tmp_path)
    with pytest.raises(UserError, match=f"jobs start in a clone of the repository, and {tmp_path} is none"):
        slurm.main(["pipeline", "x.yaml", "--cluster", "ci"])
