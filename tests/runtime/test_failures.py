"""Which error is told, when several ranks fail."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from mepa_ds import distributed
from mepa_ds.distributed import Launch, SetupError
from mepa_ds.errors import UserError
from mepa_ds.runtime import failures
from tests.runtime.test_lost_peers import OWN

CLOSED = "Connection closed by peer [10.0.0.2]:4711"


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(failures, "_ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(failures, "_answer", lambda *_: None)  # a thread that would outlive the test
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)


def tell(run: Path, message: str, *reports: dict[str, Any]) -> dict[str, Any]:
    """status.json after rank 0 of two has failed; `reports` are of rank 1, each `after` so many looks of rank 0."""
    (run / "errors").mkdir(parents=True)
    for number, report in enumerate(reports):
        line = {"rank": 1, "time": time.time() + 1, "lost_peer": True, "error": "none: waits for others"} | report
        (run / f"errors/report_{number}.json").write_text(json.dumps(line))
    try:
        raise RuntimeError(message)
    except RuntimeError as error:
        failures._tell(error, run, time.time() - 1, Launch(0, 2, 0))
    status: dict[str, Any] = json.loads((run / "status.json").read_text()) if (run / "status.json").exists() else {}
    return status


@pytest.mark.parametrize("message", OWN)
def test_an_error_of_ones_own_is_told_as_it_is(
    message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = tell(tmp_path / "run", f"{message}\nException raised from init at init.cpp:3\nframe #0: c10::Error")
    assert status["error"].startswith(f"RuntimeError: {message}")
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"error: rank 0 failed: RuntimeError: {' '.join(message.split(chr(10)))}", "NCCL's last line too"


def test_where_all_ranks_answer_the_error_itself_is_the_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = tell(tmp_path / "run", CLOSED, {})
    assert (status["error"], status["rank"]) == (f"RuntimeError: {CLOSED}", 0)
    assert capsys.readouterr().err.startswith(f"error: rank 0 failed: RuntimeError: {CLOSED}\nTraceback")


def test_who_does_not_answer_is_the_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = tell(tmp_path / "run", CLOSED)
    assert status["error"].startswith("no answer from rank 1: killed from outside")
    assert "rank 0 has lost its peers:\nTraceback" in capsys.readouterr().err


def test_the_other_ranks_own_error_is_the_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tell(tmp_path / "run", CLOSED, {"lost_peer": False, "error": "KeyError: 'x'"}) == {}, "rank 1 writes it"
    assert capsys.readouterr().err == "rank 0: ended because rank 1 failed: KeyError: 'x'\n"


def test_an_own_error_that_comes_late_is_the_cause_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 writes it while rank 0 waits for answers."""
    call = failures._call

    def answered(directory: Path, since: float, world_size: int) -> list[int]:
        late = {"rank": 1, "time": time.time(), "lost_peer": False, "error": "MemoryError"}
        (directory / "rank_00001.json").write_text(json.dumps(late))
        return call(directory, since, world_size)

    monkeypatch.setattr(failures, "_call", answered)
    assert tell(tmp_path / "run", CLOSED) == {}
    assert capsys.readouterr().err == "rank 0: ended because rank 1 failed: MemoryError\n"


def test_what_a_node_lacks_is_told_by_a_new_runs_status_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in the recipe leaves no new directory; the environment's may be a rank's own, and launchers hide it."""

    def fail(error: UserError) -> None:
        raise error

    with pytest.raises(UserError):
        failures.reporting(tmp_path / "typo", lambda: fail(UserError("typo")))
    assert not (tmp_path / "typo").exists()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SetupError):
        failures.reporting(tmp_path / "run", lambda: fail(SetupError("no interface ib7")))
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status == {"state": "failed", "error": "no interface ib7"}


@pytest.mark.parametrize(("message", "status"), [(OWN[0], 1), (OWN[1], 2), ("CUDA error: device busy", 1)])
def test_what_would_happen_again_has_the_status_of_a_users_mistake(
    message: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    def fail() -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as end:
        failures.reporting(tmp_path / "run", fail)
    assert end.value.code == status


@pytest.mark.parametrize(
    ("backend", "settings", "refused"),
    [
        ("gloo", {"GLOO_SOCKET_IFNAME": "ib7"}, "ib7"),
        ("gloo", {"GLOO_SOCKET_IFNAME": "lo,ib7"}, "ib7"),
        ("gloo", {"GLOO_SOCKET_IFNAME": "lo"}, None),
        ("gloo", {"GLOO_SOCKET_IFNAME": ""}, None),
        ("gloo", {"NCCL_SOCKET_IFNAME": "ib7"}, None),
        ("nccl", {"NCCL_SOCKET_IFNAME": "ib7"}, "ib7"),
        ("nccl", {"NCCL_SOCKET_IFNAME": "=l"}, "l"),
        ("nccl", {"NCCL_SOCKET_IFNAME": "l"}, None),
        ("nccl", {"NCCL_SOCKET_IFNAME": "ib7,lo"}, None),
        ("nccl", {"NCCL_SOCKET_IFNAME": "^docker"}, None),
    ],
)
def test_a_network_interface_that_is_not_there(
    backend: str, settings: dict[str, str], refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    if refused is None:
        distributed._check_interfaces(backend)
        return
    with pytest.raises(SetupError, match=rf"has no network interface {refused} \(it has lo, eth0\); mend"):
        distributed._check_interfaces(backend)
