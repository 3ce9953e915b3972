"""What the pages and the code say about each other is so: paths, names in files, headings."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from tests.tiny_run import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [path for folder in ("mepa_ds", "slurm", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
_VALUES = r"\.\.\.|'[^']*'|[(:;]|\b(?:\d+|[NM]|index\.json)\b"
"""What stands for a value, or ends a part of a message."""
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


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    """Of each part of a message that no value interrupts, three words in a row stand in the code."""
    sources = [path for folder in ("mepa_ds", "data_tools", "slurm") for path in (ROOT / folder).rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in sources))  # literals over several lines
    rows = re.findall(r"(?m)^\| (.+?) \|", (ROOT / "docs/troubleshooting.md").read_text())
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    parts = [part.split() for message in messages for part in re.split(_VALUES, message)]
    missing = [
        " ".join(words)
        for words in parts
        if len(words) > 2 and not any(" ".join(words[at : at + 3]) in code for at in range(len(words) - 2))
    ]
    assert missing == [os.strerror(errno.ENOSPC)], "what the system itself says"
