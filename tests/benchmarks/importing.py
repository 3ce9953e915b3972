"""Benchmarks are programs, no package: how a test imports one."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from tests.tiny_run import ROOT


def load_benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/<name>.py as a module, until the test ends."""
    module_name = f"{name}_benchmark"
    spec = importlib.util.spec_from_file_location(module_name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module_name, module)
    spec.loader.exec_module(module)
    return module
