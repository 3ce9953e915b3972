"""Every command on a page is one that its program accepts; the reference says what the programs say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.commands import commands_on, parse
from tests.tiny_run import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {line: page.name for page in PAGES for line in commands_on(page.read_text())}


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: f"{COMMANDS[line]}: {line[:60]}")
def test_a_program_accepts_its_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse(line, monkeypatch)


def test_commands_are_found_and_wrong_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    block = "for n in 1 2; do\n  mepa sample \\\n    --classes $n\n"
    page = f"```bash\n{block}```\n\n    make nothing  # no\n"
    assert list(commands_on(page)) == ["mepa sample --classes 1", "make nothing  # no"]
    for line in (
        "make nothing",
        "mepa sample --clases 1 --out x.png",
        "python pretrain.py recipes/mepa_d16.yaml a.b=1",
    ):
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            parse(line, patch)


def test_the_reference_has_every_command_option_and_key() -> None:
    try:
        _reference().main(["--check"])
    except SystemExit as ended:
        pytest.fail(str(ended))


def test_commands_within_a_text_have_names_and_options_of_programs() -> None:
    """Such as `mepa evaluate --fit-classifier`: what is not a whole command."""
    known = _options_by_command((ROOT / "docs/reference/commands.md").read_text())
    wrong = []
    for page in PAGES:
        for text in re.findall(r"`mepa ([a-z][^`]*)`", page.read_text()):
            words = text.split()
            command = max((c for c in known if words[: len(c)] == list(c)), key=len, default=())
            options = [w.partition("=")[0] for w in words if w.startswith("--")] if "--" not in words else []
            if not command or any(option not in known[command] for option in options):
                wrong.append(f"{page.name}: mepa {text}")
    assert wrong == []


def _options_by_command(reference: str) -> dict[tuple[str, ...], set[str]]:
    parts = re.split(r"(?m)^##+ mepa (.+)$", reference)
    return {
        tuple(name.split()): {"--help", *re.findall(r"--[a-z][\w-]*", text)}
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def _reference() -> ModuleType:
    return _module(ROOT / "docs/tools/reference.py")


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
