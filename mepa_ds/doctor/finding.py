"""What a look has found."""

from __future__ import annotations

from typing import Literal, NamedTuple

Level = Literal["ok", "note", "problem"]


class Finding(NamedTuple):
    """One thing that was looked at. A note costs something or may be meant; a problem keeps something from working."""

    about: str
    level: Level
    text: str
    remedy: str = ""
    """What to do; empty where it is ok."""


def ok(about: str, text: str) -> Finding:
    return Finding(about, "ok", text)


def note(about: str, text: str, remedy: str) -> Finding:
    return Finding(about, "note", text, remedy)


def problem(about: str, text: str, remedy: str) -> Finding:
    return Finding(about, "problem", text, remedy)
