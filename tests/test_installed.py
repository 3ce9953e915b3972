"""From any directory, in a clone or installed."""

from __future__ import annotations

import os
import pkgutil
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import mepa_ds.cli
from mepa_ds import shipped
from mepa_ds.cli import quickstart
from mepa_ds.config.pretrain import ParallelConfig
from mepa_ds.engine import deepspeed_config
from mepa_ds.errors import UserError
from mepa_ds.project.commands import stages
from mepa_ds.slurm.profile import read_profile
from tests.slurm import stand_ins
from tests.tiny_run import ROOT, make_run

FOLDERS = ("results", "tools")
"""Folders of commands, each a module."""
# For each command of the quickstart: is the module there that it starts, and where are the recipes that it names?
_STARTS = """
import importlib.util, pathlib
from mepa_ds import shipped
from mepa_ds.cli.quickstart import project
from mepa_ds.project.commands import stages
for stage in stages(*project()):
    for command in stage.commands:
        words = command.split()
        modules = [word for flag, word in zip(words, words[1:]) if flag == "-m"]
        assert all(importlib.util.find_spec(module) for module in modules), command
        print(*modules, *words[2:4], *(shipped.find(pathlib.Path(word)) for word in words if word.endswith(".yaml")))
"""


@pytest.mark.parametrize(
    "name",
    [
        *(module.name for module in pkgutil.iter_modules(mepa_ds.cli.__path__) if module.name not in FOLDERS),
        *(
            f"{folder}.{module.name}"
            for folder in FOLDERS
            for module in pkgutil.iter_modules([f"{path}/{folder}" for path in mepa_ds.cli.__path__])
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_every_module_of_the_command_line_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`torchrun -m mepa_ds.cli.train_tokenizer RECIPE` did nothing, and that with status 0."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"mepa_ds.cli.{name}", run_name="__main__", alter_sys=True)
    assert (end.value.code, "usage:" in capsys.readouterr().out) == (0, True)


@pytest.mark.parametrize("words", [["data_tools/verify_shards.py"], ["-m", "data_tools.verify_shards"]], ids=" ".join)
def test_the_data_tools_run_from_a_clone(words: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words, "--help"]
    end = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (end.returncode, end.stdout.startswith("usage: verify_shards.py")) == (0, True), end.stderr


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


def test_own_files_of_the_working_directory_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Path("recipes/quickstart.yaml")
    assert shipped.find(recipe) == ROOT / recipe
    assert read_profile("ci").path == ROOT / "slurm/clusters/ci.env"
    with pytest.raises(UserError, match=rf"known clusters: ci, h100; copy {ROOT}/slurm/clusters/h100.env to slurm/"):
        read_profile("ours")
    for path in (recipe, Path("slurm/clusters/ci.env"), Path("slurm/clusters/ours.env")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("MEPA_PARTITION=ours\n")
    assert shipped.find(recipe) == recipe
    for name in ("ci", "ours"):
        assert read_profile(name).path == tmp_path / f"slurm/clusters/{name}.env"
    for path in (Path(), Path("other/quickstart.yaml"), Path("recipes/none.yaml"), tmp_path / "recipes/none.yaml"):
        assert shipped.find(path) == path, "not ours"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` of a wheel made from this clone puts into an empty directory. Needs no network."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mepa_ds", "data_tools", *shipped.FOLDERS):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run(wheel, cwd=source, capture_output=True, timeout=200, check=True)
    shutil.rmtree(source)
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site")]
    subprocess.run([*install, *map(str, folder.glob("*.whl"))], capture_output=True, timeout=200, check=True)
    return folder / "site"


def run(site: Path, here: Path, *command: str, timeout: float = 200, more: Mapping[str, str] | None = None) -> str:
    """What a command prints in the directory `here`, where this clone is nowhere on the path."""
    environment = os.environ | {"PYTHONPATH": str(site), "PATH": f"{site}/bin:{os.environ['PATH']}"} | dict(more or {})
    end = subprocess.run(
        command, cwd=here, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert end.returncode == 0, end.stdout + end.stderr
    return end.stdout


def test_a_wheel_is_one_package(site: Path) -> None:
    """Names such as data_tools would be in the way of others."""
    names = {path.name for path in site.iterdir()} - {"bin", "__pycache__"}
    assert names == {"mepa_ds", f"mepa_ds-{mepa_ds.__version__}.dist-info"}
    assert not any(path.is_symlink() for path in site.rglob("*"))
    scripts = Path("mepa_ds/reports/page/scripts")
    assert {path.name for path in (site / scripts).iterdir()} == {path.name for path in (ROOT / scripts).iterdir()}
    for name in shipped.FOLDERS:
        inside = {str(path.relative_to(site / "mepa_ds/shipped")) for path in (site / "mepa_ds/shipped").rglob("*.*")}
        files = {str(path.relative_to(ROOT)) for path in (ROOT / name).rglob("*.*") if "__pycache__" not in path.parts}
        assert files - inside <= {"slurm/submit.sh"}, "that is for a clone"


def test_installed_commands_find_what_they_start(site: Path, tmp_path: Path) -> None:
    versions = f"(torch {metadata.version('torch')}, deepspeed {metadata.version('deepspeed')})"
    assert run(site, tmp_path, "mepa", "--version") == f"mepa_ds {mepa_ds.__version__} {versions}\n"
    assert "usage: mepa quickstart" in run(site, tmp_path, "mepa", "quickstart", "--help")
    started = run(site, tmp_path, sys.executable, "-c", _STARTS).splitlines()
    assert len(started) == sum(len(stage.commands) for stage in stages(*quickstart.project()))
    words = {word for line in started for word in line.split()}
    assert {"data", "build", "precompute", "mepa_ds", "torch.distributed.run"} < words
    recipes = {f"{site}/mepa_ds/shipped/recipes/{name}quickstart.yaml" for name in ("", "tokenizer_")}
    assert {word for word in words if word.endswith(".yaml")} == recipes
    plan = run(site, tmp_path, "mepa", "pretrain", "recipes/quickstart.yaml", "--dry-run", "--world-size", "2")
    assert "2 ranks" in plan
    assert list(tmp_path.iterdir()) == []


def test_jobs_of_an_installed_package_start_in_the_working_directory(site: Path, tmp_path: Path) -> None:
    """By a shipped profile, with a recipe that names no file of DeepSpeed's."""
    fakes = stand_ins.write(tmp_path)
    recipe = make_run(tmp_path)
    values = yaml.safe_load(recipe.read_text())
    del values["parallel"]["deepspeed"]
    recipe.write_text(yaml.safe_dump(values | {"output_dir": "runs/tiny"}))
    here = {**fakes, "PATH": f"{tmp_path}/bin:{site}/bin:{os.environ['PATH']}"}
    words = ("slurm", "submit", "recipe.yaml", "--cluster", "ci", "--dry-run")
    line = shlex.split(run(site, tmp_path, "mepa", *words, more=here).splitlines()[-1])
    scripts = site / "mepa_ds/shipped/slurm"
    assert line[0] == "sbatch"
    assert line[-2:] == [f"{scripts}/pretrain.sbatch", f"{tmp_path}/recipe.yaml"]
    assert f"--chdir={tmp_path}" in line
    (exports,) = (word.removeprefix("--export=").split(",") for word in line if word.startswith("--export="))
    assert exports[:3] == [f"MEPA_ROOT={tmp_path}", f"MEPA_SLURM={scripts}", f"MEPA_CLUSTER={scripts}/clusters/ci.env"]

    # The job's first lines: they find their library, the profile, and the recipe's values.
    job = f"source {scripts}/lib.sh; mepa_setup; printenv PYTHONPATH; "
    job += f"ask mepa_ds.slurm.in_job.recipe_value output_dir {recipe}"
    there = {**dict(word.split("=") for word in exports if "=" in word), "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}
    assert run(site, tmp_path, "bash", "-c", f"set -euo pipefail; {job}", more=here | there) == f"{site}\nruns/tiny\n"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstart_of_an_installed_package(site: Path, tmp_path: Path) -> None:
    """All stages, in an empty directory."""
    said = run(site, tmp_path, "mepa", "quickstart", timeout=1700)
    assert said.count(": done in ") == len(stages(*quickstart.project()))
    assert {path.name for path in tmp_path.iterdir()} == {"data", "runs"}
    assert (tmp_path / "runs/quickstart/report.json").exists()
