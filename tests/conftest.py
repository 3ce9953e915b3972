"""How tests are shared out between processes (`pytest -n 2`, as `make test` does): file by file. Marks, fixtures."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from mepa_ds.data.remote import schemes
from mepa_ds.distributed import uses_gpu
from tests.browser import Browser, opened
from tests.on_request import FULL

HERE = Path(__file__).parent
# The longest first, so that processes end together. The SLURM cluster of tests/slurm comes last and in one process: it
# tells its nodes from dead ones by how fast they answer, so it should have the machine to itself.
ORDER = (
    "cli/test_quickstart.py", "planning", "checkpoint", "pretrain", "runtime", "engine", "train_tokenizer", "tokenizer",
    "data_tools", "data",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Whatever GPUs there are, tests and all that they start compute on the CPU, but for those of `pytest -m gpu`."""
    chosen = config.option.markexpr
    if "gpu" not in chosen or "not gpu" in chosen:
        os.environ["MEPA_ACCELERATOR"] = "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(HERE)
        first = next((number for number, start in enumerate(ORDER) if path.is_relative_to(start)), len(ORDER))
        return first + path.is_relative_to("slurm")

    items.sort(key=place)
    on_request = pytest.mark.skip(reason="slow: MEPA_FULL_TESTS=1 runs it")
    for item in items:
        if item.get_closest_marker("slow") and not FULL:
            item.add_marker(on_request)
        if item.get_closest_marker("gpu") and not uses_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and pytest -m gpu"))


class _ByFile(LoadScopeScheduling):
    """A process runs whole files, whose fixtures are then made once, and one runs all of tests/slurm."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/slurm" if nodeid.startswith("tests/slurm/") else nodeid.split("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    config.option.loadscopereorder = False
    return _ByFile(config, log)


@pytest.fixture(autouse=True)
def _no_users_word() -> Iterator[None]:
    """What a test allows remote.json to name counts for that test alone."""
    yield
    schemes.forget()


@contextmanager
def serving(directory: Path) -> Iterator[str]:
    """Shows a directory by HTTP; yields the address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a web server that shows `far`."""
    if shutil.which("curl") is None:
        pytest.skip("webdataset opens http with curl")
    with serving(tmp_path / "far") as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium, one for all tests of a file."""
    with opened() as started:
        yield started
