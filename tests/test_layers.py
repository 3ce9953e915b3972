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
# From the bottom up. A part imports parts of lower layers, and none beside it. What is not named here, the single files
# of the package, is the foundation of all and imports nothing but itself.
LAYERS = (
    ("config",),
    ("command_line", "images", "runtime", "weights"),
    ("data", "models", "teachers", "tokenizer"),
    ("generation", "objective"),
    ("checkpoint", "data_tools", "evaluation", "reports", "watching"),
    ("inspection", "model_cards", "serving"),
    ("engine",),
    ("pretrain", "train_tokenizer"),
    ("planning",),  # measures what a pretraining process holds before it begins
    ("slurm",),
    ("doctor", "scaling"),
    ("ablation", "sweep"),
    ("project",),
    ("cli",),
    ("__main__",),
)
LAYER_OF = {part: number for number, parts in enumerate(LAYERS, start=1) for part in parts}
# Searches do not follow the link by which the folder at the top level is part of the package.
FILES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE / "data_tools").rglob("*.py")])


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """All modules that a file imports, inside functions too, but for type checking; and the names taken from them."""
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
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", [alias.name for alias in node.names]


def part_of(module: str) -> str:
    """Of "mepa_ds.data.order": "data"."""
    return module.split(".")[1] if module.startswith("mepa_ds.") else module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return  # the public names, imported on first use
    own = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module, _ in imports(path):
        assert module.split(".")[0] != "data_tools", f"{path}: installed, it is mepa_ds.data_tools"
        if not module.startswith("mepa_ds"):
            assert own == "engine" or not module.startswith("deepspeed"), f"{path} imports {module}"
            continue
        other = part_of(module)
        above, below = LAYER_OF.get(own, 0), LAYER_OF.get(other, 0)
        assert below < above or other == own or above == below == 0, f"{own} imports {module}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not by imports inside functions either."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    del modules["mepa_ds"]  # the public names, imported on first use
    edges = {
        name: {
            f"{module}.{taken}" if f"{module}.{taken}" in modules else module
            for module, names in imports(path)
            for taken in names or [""]
        }
        for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name in modules and name not in done:
            for other in sorted(edges[name] - {name}):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(modules):
        visit(name, ())


def test_folders_are_small() -> None:
    """What is in a folder is read at a glance."""
    for folder in {path.parent for path in FILES}:
        count = sum(path.is_file() for path in folder.iterdir())
        assert count <= 12, f"{folder.relative_to(ROOT)}: {count} files"


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
