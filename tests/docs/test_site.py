"""The documentation as a site: every page is in its contents, every link and anchor leads somewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import PHONE, Browser
from tests.conftest import serving
from tests.tiny_run import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]  # --quiet would hide faults
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_every_page_is_there_with_its_pictures(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert {Path("index.html"), *pages} <= {path.relative_to(site) for path in site.rglob("*.html")}


@pytest.mark.parametrize("page", ["index.html", "reference/recipes.html"])
def test_a_page_asks_nothing_of_elsewhere_and_fits_a_phone(site: Path, browser: Browser, page: str) -> None:
    with serving(site) as address:
        browser.open(f"{address}/{page}", PHONE)
        assert browser.overflow() == 0
        assert browser.problems() == []
