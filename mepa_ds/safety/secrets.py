"""The one place that takes secrets out of text: passwords and signatures of URLs, headers, and tokens.

Whatever reaches a message, a log, a record or an index has passed `redacted`.
"""

from __future__ import annotations

import os
import re
from typing import Any

_NOT_YET = r"(?!\.{3}(?:[:;,)\s]|$))"
"""What has been redacted already stays, with the punctuation behind it: messages are made of messages."""
USERINFO = re.compile(r"(://)[^/\s'\"<>?#]*@")
HEADER = re.compile(
    r"(?i)((?:authorization|cookie|x-[\w-]*(?:token|key))\s*[:=]\s*(?:(?:bearer|basic|token)\s+)?)"
    + _NOT_YET
    + r"[^\s'\"]+"
)
_QUERY = re.compile(r"(://[^\s'\"<>?#|]*)[?#]" + _NOT_YET + r"([^\s'\"<>|]*)")
_WORD = re.compile(
    r"(?i)((?:^|[\s?&;,'\"{(])[\w.-]*(?:signature|token|secret|passwd|password|credential|api[-_]?key|sig)['\"]?=)"
    + _NOT_YET
    + r"[^\s&;,'\"<>|]+"
)
# As JSON, YAML and Python's dictionaries have it, and as options whose value is the next word.
_VALUE = re.compile(
    r"(?i)(\b(?:[\w.-]+[_-](?:token|secret)|[\w.-]*(?:api[-_]?key|access[-_]?key|passwd|password|passphrase))['\"]?\s*:\s+"
    r"['\"]?|['\"](?:token|secret)['\"]\s*:\s*['\"]|--[\w-]*(?:token|secret|password|api-key)\s+)"
    + _NOT_YET
    + r"(?![<-])[^\s&;,'\"<>|]{8,}"
)
_BEARER = re.compile(r"(?i)(\bbearer\s+)" + _NOT_YET + r"[\w.~+/=-]{8,}")
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{6,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}"
    r"|sk-[\w-]{20,}|glpat-[\w-]{20,}|xox[abprs]-[\w-]{10,})"
)
"""Tokens that are known by how they begin: Hugging Face's, GitHub's, Amazon's, GitLab's, Slack's..."""
_SECRET_NAME = re.compile(r"(?i)(?:TOKEN|(?:API|_)KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)
_SHORTEST = 8


def redacted(text: str) -> str:
    """A text, such as an error's, without what gives access.

    URLs lose user, password, query and fragment, headers their keys, and tokens go, also those that an environment
    variable such as HF_TOKEN holds. `pipe:` commands and several URLs in one text are looked through too.
    """
    if len(text) < _SHORTEST:
        return text
    if "://" in text:
        text = _QUERY.sub(_without_query, USERINFO.sub(r"\1", text))
    text = _BEARER.sub(r"\1...", _VALUE.sub(r"\1...", _WORD.sub(r"\1...", HEADER.sub(r"\1...", text))))
    text = _TOKEN.sub("...", text)
    for secret in _of_environment():
        text = text.replace(secret, "...")
    return text


def redacted_json(value: Any) -> Any:
    """What JSON can hold, with `redacted` texts; those under a secret's name go whole."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {
            redacted(str(key)): "..." if is_secret_name(str(key)) and isinstance(item, str) else redacted_json(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], float):  # the many numbers of a record
            return value
        return [redacted_json(item) for item in value]
    return value


def _without_query(found: re.Match[str]) -> str:
    """The punctuation behind an address is the sentence's."""
    return f"{found[1]}?...{found[2][len(found[2].rstrip(':;,)')) :]}"


def expanded_variables(text: str) -> str:
    """`os.path.expandvars`, but for variables that hold secrets: what is expanded becomes the name of a file."""
    return _VARIABLE.sub(lambda v: v[0] if is_secret_name(v[1] or v[2]) else os.path.expandvars(v[0]), text)


def is_secret_name(variable: str) -> bool:
    """Whether an environment variable holds a secret, by its name."""
    return _SECRET_NAME.search(variable) is not None


def _of_environment() -> list[str]:
    """The longest first, since one may be part of another. Paths (files with tokens) are no secrets."""
    found = {
        value
        for name, value in os.environ.items()
        if is_secret_name(name) and len(value) >= _SHORTEST and not value.startswith("/")
    }
    return sorted(found, key=len, reverse=True)
