"""What is installed: locked by hash, above the floors, listed with its licence; the lock names no machine."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of pyproject.toml")
ROOT = Path(__file__).parent.parent.parent
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _floors() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"]
    words = [*PROJECT["project"]["dependencies"], *(word for name in extras if name != "lock" for word in extras[name])]
    words += [*PROJECT["tool"]["uv"]["constraint-dependencies"], *PROJECT["dependency-groups"]["build"]]
    return [Requirement(word) for word in words if not word.startswith(("mepa_ds", "mutmut"))]


def _locked() -> dict[str, list[Version]]:
    found: dict[str, list[Version]] = {}
    for name, number in re.findall(r"^([\w.-]+)==([^\s;\\]+)", LOCK, re.MULTILINE):
        found.setdefault(name.lower(), []).append(Version(number))
    return found


@pytest.mark.parametrize("floor", _floors(), ids=str)
def test_lock_and_installation_are_above_the_floors(floor: Requirement) -> None:
    name = floor.name.lower().replace("_", "-")
    assert all(number in floor.specifier for number in _locked().get(name, [])), floor
    try:
        assert Version(version(name)) in floor.specifier
    except PackageNotFoundError:
        assert name not in {"torch", "pillow", "numpy", "pyyaml", "safetensors"}


def test_every_package_of_the_project_is_locked() -> None:
    names = {Requirement(word).name.lower().replace("_", "-") for word in PROJECT["project"]["dependencies"]}
    assert names <= _locked().keys(), "run `make lock`"


def test_each_locked_package_has_hashes_and_none_names_a_place() -> None:
    blocks = re.split(r"\n(?=[^\s#])", "\n" + LOCK)[1:]
    assert len(blocks) > 100
    for block in blocks:
        assert re.match(r"[\w.-]+==\S+", block), block[:80]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block[:80]
    lines = [line for line in LOCK.splitlines() if not line.startswith("#")]
    assert not [line for line in lines if re.search(r"://|@ |--(index|extra|find|trusted)|^\s*/|\.\./", line)]


def test_setup_takes_nothing_but_the_lock() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "--require-hashes --requirement $(LOCK)" in makefile
    assert "--no-deps --no-build-isolation --no-index --editable ." in makefile
    assert "PIP_BUILD_CONSTRAINT=$(LOCK) $(PIP) install --require-hashes" in makefile  # of what builds packages, too
    assert "--require-hashes --requirement .venv/pip.lock" in makefile  # pip itself, which must know that
    assert "pip>=25.3" in PROJECT["dependency-groups"]["build"]


def test_licences_are_listed() -> None:
    spec = importlib.util.spec_from_file_location("licences", ROOT / "docs" / "tools" / "licences.py")
    assert spec is not None
    assert spec.loader is not None
    licences = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(licences)
    page = (ROOT / "docs" / "licences.md").read_text()
    listed = set(re.findall(r"^\| ([\w.-]+) \|", page, re.MULTILINE)) - {"package"}
    assert listed <= licences.locked(), "run `make licences`"
    names = {Requirement(word).name.lower().replace("_", "-") for word in PROJECT["project"]["dependencies"]}
    assert names <= listed, "run `make licences`"
    assert licences.licence_of(licences.distribution("numpy"))
