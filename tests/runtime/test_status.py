"""status.json is read back as it was written; whatever else stands there is as good as nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from mepa_ds.runtime.status import STATUS_NAME, read_status, write_status


def test_a_status_is_read_back(tmp_path: Path) -> None:
    write_status(tmp_path / "run", "failed", step=3, error="full")
    assert read_status(tmp_path / "run") == {"state": "failed", "step": 3, "error": "full"}
    assert read_status(tmp_path) == {}


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '"running"', "\x00"])
def test_what_is_no_status_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / STATUS_NAME).write_text(text)
    assert read_status(tmp_path) == {}
