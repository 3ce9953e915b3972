"""`mepa data`: the programs of data_tools/ by one door."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mepa_ds.cli import data
from mepa_ds.data.shards.index import ShardIndex
from mepa_ds.data_tools import build_shards
from tests.tiny_run import ROOT


@pytest.mark.parametrize("name", data.TOOLS)
def test_the_help_of_each_tool_names_the_door(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        data.main([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mepa data {name} ")


def test_it_is_the_same_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words give the same set, to the byte of its index."""
    words = ("digits", "--split", "heldout", "--workers", "0", "--out")
    data.main(["build", *words, str(tmp_path / "one")])
    monkeypatch.setattr(sys, "argv", ["build_shards.py", *words, str(tmp_path / "other")])
    build_shards.main()
    assert ShardIndex.read(tmp_path / "one") == ShardIndex.read(tmp_path / "other")
    data.main(["verify", str(tmp_path / "one"), "--workers", "0"])
    data.main(["merge", str(tmp_path / "one")])


def test_a_damaged_set_has_the_tools_own_status(tmp_path: Path) -> None:
    data.main(["build", "digits", "--split", "heldout", "--workers", "0", "--out", str(tmp_path / "set")])
    tar = next((tmp_path / "set").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1024])
    with pytest.raises(SystemExit) as end:
        data.main(["verify", str(tmp_path / "set"), "--workers", "0"])
    assert end.value.code == 1


def test_an_unknown_tool_is_told_the_known_ones() -> None:
    command = [sys.executable, "-m", "mepa_ds", "data", "buid"]
    end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert end.returncode == 2
    assert end.stderr.startswith("error: no tool 'buid'; did you mean 'build'?\nusage: mepa data COMMAND")
