"""`mepa completion`: bash runs the script and completes; the words are those of the help texts. And `mepa --help`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mepa_ds.cli import data, main
from mepa_ds.cli.tools import completion
from mepa_ds.command_line.completion import Words, script, words_of

_TRY = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _mepa; echo "${COMPREPLY[*]}"
"""
COMMANDS = ("data", "slurm", "pretrain", "watch")


def complete(path: Path, *words: str) -> list[str]:
    command = ["bash", "-c", _TRY, "bash", str(path), "mepa", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()


@pytest.fixture(scope="module")
def words() -> Words:
    """Of some commands: of each kind of command line one."""
    tools = {"build": data.TOOLS["build"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "1000")
        return words_of(completion.run, {"data": tools}, dict.fromkeys(COMMANDS))


def test_bash_completes_commands_and_options(words: Words, tmp_path: Path) -> None:
    path = tmp_path / "mepa.bash"
    path.write_text(script("bash", "mepa", words))
    assert complete(path, "pre") == ["pretrain"]
    assert complete(path, "") == list(COMMANDS)
    assert complete(path, "data", "build", "imag") == ["imagefolder", "imagenet"]
    assert complete(path, "data", "build", "imagefolder", "--ro") == ["--root"]
    assert complete(path, "data", "build", "--out", "x", "imagefolder", "--image-s") == ["--image-side"]
    assert complete(path, "slurm", "submit", "--dr") == ["--dry-run"]
    assert complete(path, "watch", "--o") == ["--once"]
    assert complete(path, "watch", "runs/") == [], "left to bash, which knows files"


def test_choices_of_an_option_are_no_commands(words: Words) -> None:
    assert list(words.commands["slurm"].commands) == ["submit", "pipeline", "status"]
    assert words.commands["slurm"].commands["submit"].commands == {}
    assert "--job" in words.commands["slurm"].commands["submit"].options


def test_values_are_no_commands() -> None:
    """Such as the None of `mepa evaluate {None}|PATH`."""
    for usage, commands in (("x [-h] {None}|PATH", []), ("x [--a {b,c}] {d,e}", ["d", "e"])):
        found = words_of(lambda words, usage=usage: print(f"usage: {usage}\n\n  --a"), {}, {"x": None})  # type: ignore[misc]
        assert list(found.commands["x"].commands) == commands


def test_scripts_of_other_shells(words: Words) -> None:
    assert script("zsh", "mepa", words).startswith("autoload -U +X bashcompinit")
    fish = script("fish", "mepa", words).splitlines()
    assert (
        "complete -c mepa -n \"__mepa_after data build\" -a 'digits idx imagefolder imagenet parquet webdataset'"
        in fish
    )
    assert 'complete -c mepa -n "__mepa_after watch" -l once' in fish


def test_help_shows_every_command_in_a_group() -> None:
    shown = main.usage()
    grouped = [name for names in main.GROUPS.values() for name in names]
    assert [name for name in main.COMMANDS if name not in grouped] == []
    assert all(f"  {name} " in shown for name in main.COMMANDS)
    assert shown.index("start here") < shown.index("data\n") < shown.index("train\n") < shown.index("cluster\n")
