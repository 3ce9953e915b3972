"""What reaches a terminal or a log passes one place (mepa_ds/log.py), and says nothing that is not ours to say."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from mepa_ds import log
from tests.security.hostile import NAME, assert_harmless

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "mepa_ds").rglob("*.py"), *(ROOT / "data_tools").rglob("*.py")])
WRITERS = {"mepa_ds/log.py": "the one place"}
DRAWERS = {
    "mepa_ds/progress/__init__.py": "bars; descriptions pass printable",
    "mepa_ds/project/stages/display.py": "a bar over the stages of `mepa init --run`, whose names are ours",
    "mepa_ds/runtime/recorder.py": "a bar over a run's steps; its lines pass log.shown",
    "mepa_ds/train_tokenizer/records.py": "a bar over a run's steps; its lines pass log.shown",
    "mepa_ds/scaling/running/run.py": "a bar over the runs of a study, whose names are plain",
    "mepa_ds/cli/tools/watch.py": "rich, which draws what mepa_ds/watching/frame.py makes printable",
    "mepa_ds/watching/frame.py": "rich's Text, which reads no markup",
}


def writes(tree: ast.AST) -> Iterator[int]:
    """Lines that write to a standard stream."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            is_stream = called.startswith(("sys.std", "sys.__std")) and "write" in called
            if is_stream or called in ("print", "pprint", "os.write"):
                yield node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_streams_are_written_in_one_place(path: Path) -> None:
    name, tree = str(path.relative_to(ROOT)), ast.parse(path.read_text())
    if name not in WRITERS:
        assert not list(writes(tree)), "use log.say (stdout) or log.note (stderr)"
    modules = {
        module.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for module in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    if name not in DRAWERS:
        assert not modules & {"rich", "tqdm"}, "draw with mepa_ds.progress, or say here why not"


def test_say_and_note_show_a_hostile_name_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    log.say(f"class {NAME}", flush=True)
    log.say(f"class {NAME}", to_stderr=True)
    log.note(f"class {NAME}")
    said = capsys.readouterr()
    assert_harmless(said.out)
    assert_harmless(said.err)
    assert "owned" in said.out


def test_say_takes_secrets_out(capsys: pytest.CaptureFixture[str]) -> None:
    log.say("reading https://me:PASSW0RD@host/x.tar?X-Amz-Signature=SIGNATURE")
    assert capsys.readouterr().out == "reading https://host/x.tar?...\n"


def test_answers_to_programs_are_not_changed(capsys: pytest.CaptureFixture[str]) -> None:
    log.answer("data.tokens=/sets/a?b")
    assert capsys.readouterr().out == "data.tokens=/sets/a?b\n"
