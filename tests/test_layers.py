"""Imports only go down, and DeepSpeed is imported in one package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mepa_ds"
# Layer of each part; what is not named here (single files, config) is layer 0.
LAYERS = {
    "tokenizer": 1,
    "models": 1,
    "teachers": 1,
    "data": 1,
    "objective": 2,
    "pretrained": 2,
    "engine": 3,
    "loops": 4,
    "slurm": 5,
    "cli": 5,
    "__main__": 5,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """All modules that a file imports, inside functions too, but for type checking."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return  # the public names, imported on first use
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    own_layer = LAYERS.get(own, 0)
    for module in imports(path):
        if not module.startswith("mepa_ds"):
            assert own == "engine" or not module.startswith("deepspeed"), f"{path} imports {module}"
            continue
        other = part_of(module)
        layer = LAYERS.get(other, 0)
        assert layer <= own_layer, f"{path} (layer {own_layer}) imports {module} (layer {layer})"
        assert layer != 1 or own_layer != 1 or other == own, f"{path} imports its sibling {module}"


def test_import_needs_no_deepspeed_and_is_quick() -> None:
    """On top of torch, which takes most of the time; both in the processor time of one process."""
    code = (
        "import time, sys; start = time.process_time(); import torch; torchs = time.process_time() - start; "
        "import mepa_ds; mepa_ds.NextScaleTransformer; "
        "print((time.process_time() - start) / torchs, 'deepspeed' in sys.modules, 'timm' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True
    ).stdout
    times, *foreign = output.split()
    assert foreign == ["False", "False"]
    assert float(times) < 2, "as long again as torch's own import"
