"""The commands on a page, and a parse of each by the program that it calls, which then does nothing."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tyro

from mepa_ds.cli import main as mepa
from mepa_ds.cli import slurm
from mepa_ds.command_line import recipes
from mepa_ds.config.base import load_config
from mepa_ds.config.pretrain import PretrainConfig
from tests.tiny_run import ROOT

_PROGRAMS = ("mepa", "python", "python3", "torchrun", "deepspeed", "make", "slurm/submit.sh", "pip", "srun")
_LAUNCHERS = {"torchrun": 0, "deepspeed": 0, "srun": 1}
"""The words of each that are a program of its own."""


def commands_on(page: str) -> Iterator[str]:
    """Yields each command of a page, on one line: those in fenced and in indented blocks.

    Variables of a block (`wsd="..."`, `for split in train val`) are filled in, with the first value of a loop.
    """
    for block in _blocks(page):
        values: dict[str, str] = {}
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            text = line.strip().removeprefix("$ ")
            if loop := re.match(r"for (\w+) in (\S+)", text):
                values[loop[1]] = loop[2]
            elif given := re.fullmatch(r"(\w+)=(\".*\"|'.*'|\S+)", text):
                values[given[1]] = given[2].strip("\"'")
            elif _program(text) is not None:
                yield _filled_in(text, values)


def _filled_in(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], found[0]), text)


def _blocks(page: str) -> Iterator[str]:
    fence = re.compile(r"(?ms)^( *)```(\w*)[^\n]*\n(.*?)^ *```$")
    yield from (found[3] for found in fence.finditer(page) if found[2] in ("", "bash", "sh", "console"))
    yield from (found[0] for found in re.finditer(r"(?m)(?:^    .*\n?)+", fence.sub("", page)))


def _program(line: str) -> str | None:
    """The program of a line, without settings before it; None for anything else than a command."""
    words = re.sub(r"^(?:\w+=\S+ )+", "", line).split()
    program = words[0].removeprefix(".venv/bin/") if words else ""
    return program if program in _PROGRAMS and len(words) > 1 and words[1] not in ("=", "|") else None


class _Parsed(SystemExit):
    """A program has understood its words."""


def parse(line: str, patch: pytest.MonkeyPatch) -> None:
    """Lets the program of a command read its words, and no more.

    Raises:
        AssertionError: it does not accept them, or there is no such program.
    """
    words = shlex.split(re.sub(r"^(?:\w+=\S+ )+", "", line), comments=True)
    words = [word for word in words if word not in ("&", "&&", "|")]
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program in _LAUNCHERS:
        at = next((n for n, word in enumerate(rest) if word.endswith(".py") or word in ("-m", "python")), None)
        assert at is not None, f"{line}: starts no program of ours"
        program, rest = "python", rest[at + (rest[at] == "python") :]
    if program == "make":
        targets = [word for word in rest if "=" not in word and not word.startswith("-")]
        missing = [t for t in targets if not re.search(rf"(?m)^{re.escape(t)}:", (ROOT / "Makefile").read_text())]
        assert not missing, f"{line}: no target {missing}"
    elif program == "pip":
        extras = [name for found in re.findall(r"\[([\w,]+)\]", line) for name in found.split(",")]
        declared = (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"(?m)^{name} = \[", declared) for name in extras), f"{line}: no such extra"
    elif program == "slurm/submit.sh":
        _run_until_parsed(["-m", "mepa_ds", "slurm", "submit", *rest], line, patch)
    elif program == "mepa":
        _run_until_parsed(["-m", "mepa_ds", *rest], line, patch)
    else:
        _run_until_parsed(rest, line, patch)


def _run_until_parsed(words: Sequence[str], line: str, patch: pytest.MonkeyPatch) -> None:
    name, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if name == "pytest":
        assert all((ROOT / w.split("::")[0]).exists() for w in rest if w.startswith("tests")), f"{line}: no such test"
        return
    _stop_when_parsed(patch)
    try:
        if name == "mepa_ds":
            patch.setattr(sys, "argv", ["mepa", *rest])
            mepa.main()
        else:
            patch.setattr(sys, "argv", [name, *rest])
            if words[0] == "-m":
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                assert (ROOT / name).exists(), f"{line}: no {name}"
                runpy.run_path(str(ROOT / name), run_name="__main__")
    except _Parsed:
        return
    except SystemExit as ended:
        if ended.code:
            raise AssertionError(f"{line}: refused, with status {ended.code}") from ended
        return
    raise AssertionError(f"{line}: the program has read no words of its command line")


def _stop_when_parsed(patch: pytest.MonkeyPatch) -> None:
    real = tyro.cli

    def cli(*arguments: Any, **options: Any) -> Any:
        real(*arguments, **options)
        raise _Parsed(0)

    def loaded(config_type: Any, path: Path, overrides: Sequence[str] = ()) -> Any:
        if not path.exists():  # a name that stands for a recipe of one's own
            kind = "quickstart" if config_type is PretrainConfig else "tokenizer_quickstart"
            path = ROOT / f"recipes/{kind}.yaml"
        load_config(config_type, path, overrides)
        raise _Parsed(0)

    def parsed(_: Any) -> Any:
        raise _Parsed(0)

    patch.setattr(tyro, "cli", cli)
    patch.setattr(recipes, "load_config", loaded)
    patch.setattr(slurm, "read_profile", parsed)
    patch.setattr(slurm, "status", parsed)
