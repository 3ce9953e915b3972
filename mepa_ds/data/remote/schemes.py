"""Which addresses are opened: a list of schemes, and those of them that need the user's word.

A data directory, which may be a stranger's, says in remote.json where its shards are. It may name the web and the
stores, which only send bytes. It may not name a shell command (`pipe:`), a file of this machine (`file:`), or a host
that the user's SSH keys are shown to (`sftp:`, `scp:`): these are opened when the user has said so, in the recipe
(`data.remote_schemes`) or by the option --remote-schemes of a tool. An address on the command line is the user's own.

The word counts for a process: `allow` is called by entry points alone, with what the recipe or the command line says,
never with what a run's records or a data directory say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mepa_ds.config.values import RemoteScheme
from mepa_ds.errors import UserError

FROM_DATA = ("http", "https", "ftp", "ftps", "s3", "gs", "hf")
"""What a data directory may name."""
AT_THE_USERS_WORD = ("pipe", "file", "sftp", "scp")
_MOST_LETTERS = 1 << 16
_SCHEME = re.compile(r"([a-z][a-z0-9+]*)(:(?://)?)")
_allowed: set[str] = set()
_given: set[str] = set()


def allow(schemes: Iterable[RemoteScheme]) -> None:
    """Notes the user's word for this process: data directories may name these schemes, too."""
    _allowed.update(schemes)


def allow_these(urls: Iterable[str]) -> None:
    """Notes addresses that the user has given to this process: a data directory may name these very ones."""
    _given.update(urls)


def forget() -> None:
    """Takes the user's word back."""
    _allowed.clear()
    _given.clear()


def scheme_of(url: str) -> str:
    """The scheme of an address, one of those that are opened.

    Raises:
        ValueError: it has another one or none, begins with a dash, or holds a control character.
    """
    if not url.isprintable():
        raise ValueError("the address holds a control character")
    if len(url) > _MOST_LETTERS:
        raise ValueError(f"the address has more than {_MOST_LETTERS} letters")
    found = _SCHEME.match(url)
    scheme = found[1] if found else ""
    if found is None or scheme not in (*FROM_DATA, *AT_THE_USERS_WORD) or (found[2] == ":") != (scheme == "pipe"):
        given = f"{scheme}: is" if scheme else "this is"
        raise ValueError(f"{given} no address that is opened; give one that begins with {', '.join(FROM_DATA)}://")
    return scheme


def check_from_data(urls: Iterable[str], where: str) -> None:
    """Checks addresses that a data directory names.

    Raises:
        UserError: one of them is not opened, or needs the user's word, which was not given.
    """
    for url in urls:
        try:
            scheme = scheme_of(url)
        except ValueError as error:
            raise UserError(f"{where}: {url[:200]}: {error}") from None
        if scheme in AT_THE_USERS_WORD and scheme not in _allowed and url not in _given:
            raise UserError(f"{where}: {_why(scheme)} If you trust who made this directory, {how_to_allow(scheme)}")


def needs_word(urls: Iterable[str]) -> str | None:
    """The first scheme among these addresses that needs the user's word; None if there is none."""
    return next((scheme for url in urls if (scheme := scheme_of(url)) in AT_THE_USERS_WORD), None)


def check_given(url: str, option: str) -> str:
    """Checks an address that the user has given; returns its scheme. Raises UserError for one that is not opened."""
    try:
        return scheme_of(url)
    except ValueError as error:
        raise UserError(f"{option}: {url[:200]}: {error}") from None


def how_to_allow(scheme: str) -> str:
    return f"set data.remote_schemes=[{scheme}] in the recipe (a tool: --remote-schemes {scheme})"


def _why(scheme: str) -> str:
    if scheme == "pipe":
        return "names shell commands (pipe:), which are not run because a data directory says so."
    if scheme == "file":
        return "names files of this machine (file:), which are not read because a data directory says so."
    return f"names {scheme}: addresses, to which your SSH keys would be shown."
