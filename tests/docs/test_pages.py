"""What the pages and the code say about each other is so: paths, names in files, headings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tiny_run import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [path for folder in ("mepa_ds", "slurm", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
OURS = r"(?:mepa_ds|data_tools|slurm|tests|recipes|ds_configs|benchmarks|docs)/[\w./-]*\w"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_on_a_page_exist(page: Path) -> None:
    paths = set(re.findall(rf"`({OURS}\.(?:py|sh|sbatch|yaml|json|env|md))[`:]", page.read_text()))
    missing = [path for path in sorted(paths) if not (ROOT / path).exists() and not Path(path).stem.isupper()]
    assert missing == [], "stems in capitals stand for a name of one's own"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_that_a_page_places_in_a_file_are_there(page: Path) -> None:
    """`mepa_ds/models/block.py:Block.forward`: the last of the names is defined in that file."""
    missing = []
    for path, name in re.findall(rf"`({OURS}\.(?:py|sh)):([\w.]+)`", page.read_text()):
        last = name.split(".")[-1]
        if not re.search(rf"(?m)^\s*(?:def |class )?{last}\b\s*(?:\(|:|=)", (ROOT / path).read_text()):
            missing.append(f"{path}:{name}")
    assert missing == []


def test_headings_that_code_points_to_exist() -> None:
    """docs/decisions.md, <heading>."""
    headings = re.findall(r"(?m)^#+ (.+)$", (ROOT / "docs/decisions.md").read_text())
    pointers = 0
    for path in SOURCES:
        for found in re.finditer(r"docs/decisions\.md, ([^).]+)", path.read_text()):
            text = " ".join(re.sub(r"\n\s*#? ?", " ", found[1]).split())
            pointers += path != Path(__file__)
            assert path == Path(__file__) or any(text.startswith(h) for h in headings), f"{path}: {text!r}"
    assert pointers > 0
