"""Who may ask the page's server: browsers that were given its own address, and pages that it has served itself.

A web page elsewhere can have a visitor's browser ask any address, also one that only this machine reaches. Its requests
carry its own `Origin`; and if its name is made to lead here (DNS rebinding), they carry that name as `Host`.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import PlainTextResponse

_Message = MutableMapping[str, Any]
_App = Callable[[_Message, Callable[[], Awaitable[_Message]], Callable[[_Message], Awaitable[None]]], Awaitable[None]]
_READS = ("GET", "HEAD")


class Guard:
    """Refuses what does not come from a page of this server.

    `is_local`: the server listens at a loopback address, so that any other name or address in `Host` is a trick.
    Elsewhere addresses, which nobody can lead astray, and this machine's names are taken.
    """

    def __init__(self, app: _App, is_local: bool):
        self._app, self._is_local = app, is_local
        self._names = {"localhost"} if is_local else {"localhost", *_own_names()}

    async def __call__(
        self,
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        if scope["type"] == "http" and (reason := self._refusal(scope)):
            await PlainTextResponse(reason + "\n", status_code=403)(scope, receive, send)  # type: ignore[arg-type]
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: _Message) -> str | None:
        values = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(values) != 1 or not self._is_ours(values[0]):
            return "this page answers under its own address only, such as http://localhost"
        for name, value in scope["headers"]:
            if name == b"origin" and scope["method"] not in _READS and not _is_same(value.decode("latin-1"), values[0]):
                return "only the page itself may draw"
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._is_local


def _is_same(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def _own_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, name.partition(".")[0], socket.getfqdn().lower()}
