"""What is shown of a name: all of it, and nothing that steers a terminal or passes for a line of ours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mepa_ds import log
from mepa_ds.errors import UserError
from mepa_ds.safety.text import message, printable, printable_json, printable_lines


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Ankle boot", "Ankle boot"),
        ("Füße 靴 🥾", "Füße 靴 🥾"),
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("a\nerror: forged", "a\\nerror: forged"),
        ("a\rb\tc", "a\\rb\\tc"),
        ("\x9b31m", "\\x9b31m"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("a\u2028b\u200bc", "a\\u2028b\\u200bc"),
        ("caf\udce9", "caf\\udce9"),
    ],
)
def test_a_name_on_one_line(name: str, shown: str) -> None:
    assert printable(name) == shown


@given(st.text(st.characters()))
def test_nothing_unseen_is_left(name: str) -> None:
    shown = printable(name)
    shown.encode()  # no surrogates
    assert not set(shown) & {chr(code) for code in (*range(32), *range(127, 160), 0x2028, 0x2029, 0x202E)}
    assert printable(shown) == shown


@given(st.text(st.sampled_from("ab \t\n\r\x1be:")))
def test_only_the_first_line_of_a_message_begins_at_the_left(text: str) -> None:
    _, *others = message(text).split("\n")
    assert all(not line or line[0].isspace() for line in others)
    assert message(message(text)) == message(text)


def test_lines_of_ours_stay() -> None:
    assert printable_lines("a\n\tb\x1b[0m") == "a\n\tb\\x1b[0m"


def test_texts_of_json_at_any_depth() -> None:
    assert printable_json({"a\n": [{"b": "\x1b"}, 1, None]}) == {"a\\n": [{"b": "\\x1b"}, 1, None]}


def test_errors_and_notes_are_messages(capsys: pytest.CaptureFixture[str]) -> None:
    error = UserError("a.tar: member 'x\x1b[8m\nerror: forged' of http://me:pw@host/a.tar?sig=1: no")
    assert str(error) == "a.tar: member 'x\\x1b[8m\n  error: forged' of http://host/a.tar?...: no"
    log.note("warning: \x1b]0;owned\x07\nerror: forged")
    log.say("class", "\x1b[8mhidden", end="|")
    seen = capsys.readouterr()
    assert seen.err == "warning: \\x1b]0;owned\\x07\n  error: forged\n"
    assert seen.out == "class \\x1b[8mhidden|"
