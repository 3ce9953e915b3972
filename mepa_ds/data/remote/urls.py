"""URLs as people may see them, as they are compared, and as names of files: without what gives access.

Presigned URLs carry a signature in their query, others a password before the host. Neither may reach a message, a log,
an index or the name of a file; and a shard is the same one when it is signed anew.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from mepa_ds.safety.secrets import HEADER, USERINFO

_QUERY_ALONE = re.compile(r"(://[^\s'\"<>?#|]*)\?([^\s'\"<>|]*)")
_SIGNED = re.compile(
    r"(?i)x-(?:amz|goog|oss|cos|obs|ms)-.*|(?:aws|google|oss)access(?:key)?id|key-pair-id|signature|expires|policy"
    r"|s[eiprstv]|spr|sig|srt|sdd|sk[a-z]{1,3}|.*token|auth|authorization|credential|api[-_]?key"
)
"""Parameters by which stores and content networks sign: Amazon's, Google's, Azure's..."""
_MOST_BYTES = 120
"""Longest name: the 255 bytes of file systems less what locks, offset indices and temporary files add to it."""


def is_remote(url: str) -> bool:
    """Whether this is meant as a URL rather than as a path."""
    return re.match(r"pipe:|[a-z0-9+]+://", url) is not None


def unsigned(url: str) -> str:
    """The part of a URL, or of a command with URLs, that a new signature does not change: to compare, not to fetch."""

    def without_signature(match: re.Match[str]) -> str:
        kept = [word for word in match[2].split("&") if not _SIGNED.fullmatch(word.partition("=")[0])]
        return match[1] + ("?" + "&".join(kept) if kept else "")

    return _QUERY_ALONE.sub(without_signature, HEADER.sub(r"\1", USERINFO.sub(r"\1", url)))


def file_names(urls: Sequence[str]) -> list[str]:
    """Names for the files at these URLs, without queries and signatures; they also differ without their extensions.

    Where names would be the same (`get?id=1`, `a/0.tar` and `b/0.tar`) all begin with their number.
    """
    names = [short_name(_last_part(url)) for url in urls]
    if len({PurePosixPath(name).stem.casefold() for name in names}) < len(names):
        names = [f"{number:06d}-{name}" for number, name in enumerate(names)]
    return names


def short_name(name: str) -> str:
    """A plain name (mepa_ds.data.shards.index.is_plain): long ones keep their beginning, their extension and a
    digest."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".-") or "shard"
    if len(plain.encode()) <= _MOST_BYTES:
        return plain
    suffix = PurePosixPath(plain).suffix[:8]
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:12]
    head = plain.encode()[: _MOST_BYTES - 30].decode(errors="ignore")
    return f"{head}-{digest}{suffix if suffix.isascii() else ''}"


def _last_part(url: str) -> str:
    if not url.startswith("pipe:"):
        return _base(re.split("[?#]", url.partition("://")[2])[0].partition("/")[2])
    words = [re.split("[?#]", word)[0] for word in re.split(r"[\s'\"|;<>()&=]+", url.removeprefix("pipe:"))]
    places = [word for word in words if "/" in word and not word.startswith("/dev/")]
    tars = [word for word in words if ".tar" in _base(word).lower()]
    return _base((tars or places or [""])[-1])


def _base(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2].partition(";")[0]
