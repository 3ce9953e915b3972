"""The page's server: FastAPI and uvicorn, which the extra `serve` installs."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import secrets
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from mepa_ds.config.base import validate
from mepa_ds.errors import UserError
from mepa_ds.interrupts import Interrupted
from mepa_ds.serving.drawing import Drawer, Event, Wish
from mepa_ds.serving.guard import Guard

_PAGE = Path(__file__).with_name("page.html")
_MOST_BYTES, _MOST_CONNECTIONS = 10_000, 64
_END_SECONDS = 5.0


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError for a port in use, and for a host that is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, kind, protocol)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen()
    except (OSError, UnicodeError, OverflowError) as error:
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise UserError(
                f"--port: {port} is in use, by another `mepa serve` perhaps; give another, or 0 for any that is free"
            ) from error
        if number == errno.EACCES:
            raise UserError(f"--port: {port} may not be used by you; give one from 1024 on") from error
        raise UserError(
            f"--host: cannot listen at {host!r} ({error}); give an address of this machine, such as 127.0.0.1"
        ) from error
    return server


def is_loopback(server: socket.socket) -> bool:
    """Whether only this machine reaches the socket."""
    return ipaddress.ip_address(server.getsockname()[0].partition("%")[0]).is_loopback


def make_app(drawer: Drawer, is_local: bool = True) -> FastAPI:
    """`/` is the page, `/model` what it says, `/draw` takes a wish and answers with a line of JSON for each event.

    `is_local`: the server listens at a loopback address; see `Guard`.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, is_local=is_local)
    page = _PAGE.read_text(encoding="utf-8")

    @app.get("/")
    def show() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        return HTMLResponse(page.replace("NONCE", nonce), headers=_headers(nonce))

    @app.get("/model")
    def model() -> JSONResponse:
        return JSONResponse(drawer.facts())

    @app.post("/draw")
    async def draw(request: Request) -> Response:
        try:
            wish = await _wish(request)
            drawer.check(wish)
            return StreamingResponse(await _events(drawer, wish), media_type="application/x-ndjson")
        except UserError as error:
            return JSONResponse({"event": "error", "message": str(error)}, status_code=400)

    return app


def _headers(nonce: str) -> dict[str, str]:
    """Nothing but the page's own script runs, and nothing is asked of another place."""
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {"Content-Security-Policy": policy, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


async def _wish(request: Request) -> Wish:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_BYTES:
            raise UserError("the request is too long")
    try:
        values = json.loads(body)  # what it holds is for `validate`, also where it is no JSON (NaN)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the request is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"the request: expected an object, got {type(values).__name__}")
    return validate(Wish, values, "cannot draw that")


async def _events(drawer: Drawer, wish: Wish) -> AsyncIterator[str]:
    """Lines of JSON. A reader that goes away stops the drawing after its scale. Raises UserError when many wait."""
    loop, events, stop = asyncio.get_running_loop(), asyncio.Queue[Event | None](), threading.Event()

    def tell(event: Event | None) -> None:
        with suppress(RuntimeError):  # the server has ended meanwhile
            loop.call_soon_threadsafe(events.put_nowait, event)

    job = drawer.draw(wish, tell, stop)
    job.add_done_callback(lambda _: tell(None))

    async def lines() -> AsyncIterator[str]:
        try:
            while (event := await events.get()) is not None:
                yield json.dumps(event) + "\n"
        finally:
            stop.set()

    return lines()


def serve(app: FastAPI, server: socket.socket, drawer: Drawer, ready: Callable[[], object] = lambda: None) -> None:
    """Serves until Ctrl-C, which is a normal end. `ready` is called when the page can be opened."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
        lifespan="off",
        limit_concurrency=_MOST_CONNECTIONS,
    )
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [server]}, name="server", daemon=True)
    thread.start()
    try:
        ready()
        while thread.is_alive():
            thread.join(1.0)
    except Interrupted as interrupt:
        if interrupt.number != signal.SIGINT:
            raise
    finally:
        runner.should_exit = True
        drawer.close()
        thread.join(_END_SECONDS)
        server.close()
