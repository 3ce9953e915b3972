"""A stand-in for the Hugging Face hub on this machine: what huggingface_hub asks of it to upload a folder."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_aSecretThatNobodySees"


class Hub:
    """Repositories with their files: large ones come by the LFS protocol, small ones within the commit."""

    def __init__(self) -> None:
        self.created: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.refuses_with: int | None = None
        self.seen: list[str] = []
        self.address = ""

    def answer(self, path: str, body: bytes) -> Any:
        """The JSON that the hub says to a POST."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.created[name] = asked
            self.files.setdefault(name, {})
            return {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": n, "uploadMode": _mode(n), "shouldIgnore": False} for n in names]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {"transfer": "basic", "objects": [{**each, "actions": self._actions(each)} for each in objects]}
        if "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            self._commit(name, [json.loads(line) for line in body.splitlines()])
            return {"commitUrl": f"{self.address}/{name}/commit/0", "commitOid": "0" * 40, "success": True}
        return {}

    def _actions(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"upload": {"href": f"{self.address}/objects/{asked['oid']}", "header": {}}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[name][value["path"]] = self.objects[value["oid"]]


def _mode(name: str) -> str:
    return "lfs" if name.endswith((".safetensors", ".png")) else "regular"


@contextmanager
def local_hub(patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in runs, and huggingface_hub in this process talks to it, logged in."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self._reply(lambda body: hub.answer(self.path.partition("?")[0], body))

        def do_PUT(self) -> None:
            self._reply(lambda body: hub.objects.update({self.path.rpartition("/")[2]: body}))

        def do_GET(self) -> None:
            self._reply(lambda body: {})

        def _reply(self, make: Any) -> None:
            body = self._body()
            hub.seen.append(f"{self.command} {self.path}")
            status = hub.refuses_with or 200
            said = json.dumps({"error": "You may not"} if hub.refuses_with else make(body)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = b""
            while size := int(self.rfile.readline(), 16):
                parts += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return parts

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_to(hub.address, patch)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def point_to(address: str, patch: pytest.MonkeyPatch) -> None:
    """huggingface_hub reads its settings once, when it is imported. The stand-in does not speak Xet's protocol."""
    from huggingface_hub import constants

    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "ENDPOINT", address)
    patch.setenv("HF_ENDPOINT", address)
    patch.setenv("HF_TOKEN", TOKEN)
