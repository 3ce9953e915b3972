"""`mepa serve`: its page in a browser, its answers to bad wishes, and the ends of the command."""

from __future__ import annotations

import base64
import io
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mepa_ds.checkpoint.run_models import find_model
from mepa_ds.cli import sample as sample_command
from mepa_ds.cli.results import serve as command
from mepa_ds.errors import UserError
from mepa_ds.serving.drawing import Drawer, Shown, Wish
from mepa_ds.tokenizer.tokenizer import Tokenizer
from tests.browser import PHONE, Browser
from tests.serving.project import NAMES, make_project

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
from mepa_ds.serving import server as serving

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    return folder


def drawer_of(run: Path) -> Drawer:
    found = find_model(run, "best")
    model = found.open()
    shown = Shown(run.name, "pretrain/best", found.step, f"mepa sample --run {run}")
    return Drawer(model, Tokenizer.open(found.tokenizer(), model.config.scales), shown)


@pytest.fixture(scope="module")
def address(project: Path) -> Iterator[str]:
    """A server in this process."""
    import uvicorn

    socket_, drawer = serving.listening("127.0.0.1", 0), drawer_of(project / "runs" / "pretrain")
    runner = uvicorn.Server(uvicorn.Config(serving.make_app(drawer), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [socket_]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{socket_.getsockname()[1]}/"
    runner.should_exit = True
    drawer.close()
    thread.join(10)


def drawn(browser: Browser) -> list[str]:
    """The addresses of the images, once they are all there."""
    browser.wait("return !at('after').hidden && at('stop').hidden")
    sources: list[str] = browser.run("return [...document.querySelectorAll('#pictures img')].map(i => i.src)")
    assert browser.run("return [...document.querySelectorAll('#pictures img')].every(i => i.naturalWidth > 0)")
    return sources


def test_a_user_draws_pictures(browser: Browser, address: str, project: Path, tmp_path: Path) -> None:
    browser.open(address)
    browser.wait("return document.querySelectorAll('#classes button').length == 3")
    buttons = [button.text for button in browser.find("#classes button")]
    assert buttons == [f"{label} {name}" for label, name in enumerate(NAMES)], "HTML in names is text"
    assert browser.find("#facts")[0].text.startswith("pretrain/best, step 10 · 3 classes · 6 × 6 pixels")
    browser.click("#classes button:nth-child(2)")
    first = drawn(browser)
    assert len(first) == 4
    assert "tench, Tinca tinca: cfg 1.5" in browser.find("#state")[0].text
    # Guidance and seed change what is drawn; the scales lead to the same images.
    browser.run("arguments[0].value = 4; arguments[0].dispatchEvent(new Event('input'))", browser.find("#cfg")[0])
    browser.run("at('seed').value = 5; at('count').value = 2")
    browser.click("#draw")
    browser.wait("return at('state').textContent.includes('cfg 4, top-k 16, top-p 0.96, seed 5')")
    second = drawn(browser)
    assert len(second) == 2
    assert set(second).isdisjoint(first)
    browser.run("arguments[0].value = 1; arguments[0].dispatchEvent(new Event('input'))", browser.find("#scale")[0])
    assert browser.find("#scale-said")[0].text == "After scale 1 of 3: 1 × 1 tokens"
    assert set(drawn(browser)).isdisjoint(second)
    browser.click("#play")
    browser.wait("return at('scale').value == 3 && at('play').textContent == 'Play'")
    assert drawn(browser) == second
    names = browser.run("return [...document.querySelectorAll('#pictures a')].map(a => a.download)")
    assert names == ["class0001_tench-Tinca-tinca_seed5_00.png", "class0001_tench-Tinca-tinca_seed5_01.png"]
    # The command that the page tells draws the same images.
    words = shlex.split(browser.find("#command")[0].text)
    out = tmp_path / "same"
    sample_command.main(["--run", str(project), *words[4:-1], str(out)])
    pixels = [np.asarray(Image.open(path)) for path in sorted(out.iterdir())]
    for source, expected in zip(second, pixels, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert np.array_equal(np.asarray(image), expected)
    browser.run("at('count').value = 10000")
    browser.click("#draw")
    assert browser.find("#message")[0].text == "Images: give a whole number from 1 to 64"
    assert browser.problems() == []


def test_on_a_phone_in_the_dark(browser: Browser, address: str) -> None:
    browser.open(address, PHONE, dark=True)
    browser.wait("return document.querySelectorAll('#classes button').length == 3")
    browser.click("#classes button:nth-child(3)")
    drawn(browser)
    browser.click("summary")
    assert browser.overflow() == 0
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert max(map(int, background.removeprefix("rgb(").rstrip(")").split(","))) < 64
    assert browser.problems() == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "192.0.2.1"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
    ],
)
def test_a_name_that_was_made_to_lead_here_is_refused(address: str, headers: dict[str, str], status: int) -> None:
    """DNS rebinding: a page elsewhere reads and draws as if it were ours."""
    httpx = pytest.importorskip("httpx")
    for place in ("", "model"):
        answer = httpx.get(address + place, headers=headers)
        assert answer.status_code == status
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("origin", "status"),
    [("", 403), ("null", 403), ("https://evil.example", 403), ("http://127.0.0.1:1", 403), ("http://[", 403),
     (None, 400), ("ours", 400)],
)  # fmt: skip
def test_pages_elsewhere_do_not_draw(address: str, origin: str | None, status: int) -> None:
    httpx = pytest.importorskip("httpx")
    headers = {} if origin is None else {"Origin": address.rstrip("/") if origin == "ours" else origin}
    assert httpx.post(address + "draw", content="{", headers=headers).status_code == status


def test_a_request_nested_without_end_is_one_message(address: str) -> None:
    httpx = pytest.importorskip("httpx")
    answer = httpx.post(address + "draw", content="[" * 9_999)
    assert answer.status_code == 400
    assert "the request is no JSON" in answer.text


def test_on_a_network_this_machines_names_and_addresses_are_taken() -> None:
    from mepa_ds.serving.guard import Guard

    async def nothing(*_: Any) -> None:
        return None

    guard = Guard(nothing, is_local=False)
    for host, expected in (("192.0.2.1:8000", True), (socket.gethostname(), True), ("evil.example", False)):
        assert guard._is_ours(host) is expected


def test_bad_wishes_are_one_message(address: str) -> None:
    httpx = pytest.importorskip("httpx")
    for body, message in [
        ('{"label": 3}', "label: expected at most 2, got 3"),
        ('{"label": 0, "count": 65}', "count: expected at most 64, got 65"),
        ('{"label": 0, "cfg": 21}', "cannot draw that: cfg: "),
        ('{"label": 0, "cfg": NaN}', "cannot draw that: cfg: "),
        ('{"label": "0"}', "cannot draw that: label: "),
        ('{"label": 0, "seed": -1}', "cannot draw that: seed: "),
        ('{"label": 0, "cuont": 1}', "cannot draw that: cuont: unknown key; did you mean 'count'?"),
        ("{", "the request is no JSON"),
        ("[]", "the request: expected an object, got list"),
        (" " * 20_000, "the request is too long"),
    ]:
        answer = httpx.post(f"{address}draw", content=body)
        assert answer.status_code == 400, body
        assert answer.json()["message"].startswith(message), answer.text
    page = httpx.get(address)
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "http" not in page.text.replace("http-equiv", ""), "nothing from elsewhere"


class SlowDrawer(Drawer):
    """Draws nothing until it may."""

    gate = threading.Event()

    def _drawn(self, wish: Wish, tell: Any, stop: threading.Event) -> Any:
        self.gate.wait(30)
        return super()._drawn(wish, tell, stop)


def test_few_wait_and_those_who_left_are_passed_over(project: Path) -> None:
    found = find_model(project, "best")
    model = found.open()
    drawer = SlowDrawer(model, Tokenizer.open(found.tokenizer()), Shown("", "", None, ""))
    events: list[list[dict[str, Any]]] = [[] for _ in range(5)]
    stops = [threading.Event() for _ in events]
    jobs = [drawer.draw(Wish(label=0, count=1), e.append, stop) for e, stop in zip(events, stops, strict=True)]
    with pytest.raises(UserError, match="5 others wait for pictures; try again in a moment"):
        drawer.draw(Wish(label=0), events[0].append, threading.Event())
    stops[1].set()
    drawer.gate.set()
    for job in jobs:
        job.result(30)
    assert events[2][0] == {"event": "waiting", "ahead": 2}
    assert [e[-1]["event"] for e in events] == ["done", "waiting", "done", "done", "done"]
    model.head.weight.data.fill_(float("nan"))
    drawer.draw(Wish(label=0), events[0].append, threading.Event()).result(30)
    assert "logits are NaN or infinite" in events[0][-1]["message"]
    drawer.close()


def test_a_reader_who_leaves_ends_the_drawing(project: Path) -> None:
    httpx, uvicorn = pytest.importorskip("httpx"), pytest.importorskip("uvicorn")
    found = find_model(project, "best")
    stops: list[threading.Event] = []

    class Noted(SlowDrawer):
        gate = threading.Event()

        def _drawn(self, wish: Wish, tell: Any, stop: threading.Event) -> Any:
            stops.append(stop)
            tell({"event": "waiting", "ahead": 0})
            return super()._drawn(wish, tell, stop)

    drawer = Noted(found.open(), Tokenizer.open(found.tokenizer()), Shown("", "", None, ""))
    socket_ = serving.listening("127.0.0.1", 0)
    runner = uvicorn.Server(uvicorn.Config(serving.make_app(drawer), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [socket_]}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{socket_.getsockname()[1]}/draw"
    with httpx.stream("POST", address, content='{"label": 0}', timeout=30) as answer:
        lines = answer.iter_lines()  # closes the connection when it is collected
        assert next(lines) == '{"event": "waiting", "ahead": 0}'
        assert not stops[0].is_set()
    assert stops[0].wait(10)
    drawer.gate.set()
    runner.should_exit = True
    drawer.close()
    thread.join(10)


def test_ctrl_c_is_a_normal_end(project: Path) -> None:
    words = [sys.executable, "-m", "mepa_ds", "serve", "--run", str(project), "--port", "0", "--host", "0.0.0.0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("open http://"):
                break
        process.send_signal(signal.SIGINT)
        lines += process.stdout.readlines()
        assert process.wait(30) == 0, lines
    assert lines[0] == f"showing {project}/runs/pretrain/best, step 10, 3 classes\n"
    assert lines[1].startswith("anybody on the network can use this page")
    assert lines[3:] == ["ended\n"]


def test_what_cannot_be_served_is_one_message(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"--port: {port} is in use, by another `mepa serve` perhaps; give another"
        ):
            command.main(["--run", str(project), "--port", str(port)])
    for options, message in [
        (["--run", str(project / "runs" / "none")], "--run: .*none is not there; give the output_dir"),
        (["--run", str(project / "runs" / "pretrain" / "best")], "best is a directory without a run"),
        ([], "give one of --run"),
        (["--run", str(project), "--port", "70000"], r"--port: expected a number in 0\.\.65535, got 70000"),
        (["--run", str(project), "--host", "192.0.2.1"], "--host: cannot listen at '192.0.2.1'"),
    ]:
        with pytest.raises(UserError, match=message):
            command.main([*options, *([] if "--port" in options else ["--port", "0"])])
    monkeypatch.delitem(sys.modules, "mepa_ds.serving.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match="mepa serve needs the package uvicorn; run: pip install"):
        command.main(["--run", str(project)])
