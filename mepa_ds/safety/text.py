"""Text out of files, as it may be shown: a name can neither steer a terminal nor pass for a line of ours."""

from __future__ import annotations

import re
from typing import Any

from mepa_ds.safety.secrets import redacted

# Control characters (C0 but for the tab, DEL, C1), line and paragraph separators, marks that reverse the direction of
# text or are not seen, and surrogates, which stand for bytes that are not UTF-8.
_HIDDEN = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff"
_UNSEEN = re.compile(f"[{_HIDDEN}]")
_UNSEEN_OR_BREAK = re.compile(f"[\t\n{_HIDDEN}]")
_LINE_START = re.compile(r"\n(?=[^\s])")


def printable(name: object) -> str:
    """One line that shows a name as it is: what would not be seen, line breaks among it, is written as an escape.

    Surrogates, which stand for bytes that are not UTF-8, are escaped too: the text can be stored and printed.
    """
    return _UNSEEN_OR_BREAK.sub(_escape, str(name))


def printable_lines(text: str) -> str:
    """A text of several lines of ours, which may hold names that nobody has looked at: line breaks and tabs stay."""
    return _UNSEEN.sub(_escape, text)


def message(text: str) -> str:
    """A message as it may be shown, logged and stored: printable and without secrets. Lines after the first are
    indented, so that a line break in a name begins no line of its own."""
    return _LINE_START.sub("\n  ", printable_lines(redacted(text)))


def printable_json(value: Any) -> Any:
    """What JSON gave, with `printable` keys and texts."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [printable_json(item) for item in value]
    if isinstance(value, dict):
        return {printable(key): printable_json(item) for key, item in value.items()}
    return value


def cell(value: Any) -> Any:
    """A cell of a table for other programs: a text that a spreadsheet would compute (=, +, -, @) gets an apostrophe."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{printable(value)}"
    return value


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if found[0] in "\t\n\r":
        return {"\t": "\\t", "\n": "\\n", "\r": "\\r"}[found[0]]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
