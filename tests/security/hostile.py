"""A name as a stranger might give it, and what must not come of it."""

from __future__ import annotations

import re

ESCAPES = "\x1b]0;owned\x07\x1b[8m"
NAME = f"cat{ESCAPES}\nerror: forged\r\nwarning: forged\x9b2J\u202e"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_FORGED = re.compile(r"(?m)^(?:error|warning): forged")


def assert_harmless(text: str) -> None:
    """What is shown, or kept in a log, of `NAME` neither steers a terminal nor passes for a line of ours."""
    assert not CONTROL.search(text), f"control characters: {text!r}"
    assert not _FORGED.search(text), f"a forged line: {text!r}"
