"""The words of a pipeline's commands, and the paths among them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from mepa_ds.config.paths import expand_path
from mepa_ds.config.values import HUB
from mepa_ds.errors import UserError

_PATHS = ("--out", "--tar", "--root", "--labels", "--classes", "--tokenizer", "--weights")
_IMAGES = {"tokens": 1, "features": 1, "fit-teacher": 2}
"""Commands of precompute.py, and where their image set stands."""


def command_words(command: str) -> list[str]:
    """A command's words, with the paths among them expanded, since no shell does it.

    Raises:
        UserError: a path cannot be expanded, or a quote is not closed.
    """
    try:
        words = shlex.split(command)
        for number, _, path in list(path_words(words)):
            words[number] = words[number].removesuffix(path) + str(expand_path(path))
    except ValueError as error:
        raise UserError(f"{command!r}: {error}") from None
    return words


def path_words(words: list[str]) -> Iterator[tuple[int, str, str]]:
    """Yields (number of a word, its option, the path in which the word ends)."""
    place = _IMAGES.get(words[0], len(words)) if words else 0
    for number, word in enumerate(words):
        name, _, value = word.partition("=")
        if number == place and not word.startswith("-"):
            yield number, "images", word
        elif name in _PATHS and value not in ("", HUB):
            yield number, name, value
        elif word in _PATHS and words[number + 1 : number + 2] not in ([], [HUB]):
            yield number + 1, name, words[number + 1]
