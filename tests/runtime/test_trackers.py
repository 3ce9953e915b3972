"""Weights & Biases may raise, hang or die: a run has one warning more, and goes on."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mepa_ds.config.base import validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.runtime.recorder import RunRecorder
from mepa_ds.runtime.trackers import service
from mepa_ds.runtime.trackers.opening import open_trackers
from mepa_ds.runtime.trackers.tensorboard import TensorBoard
from tests.tiny_run import recipe_values


class FakeWandb(SimpleNamespace):
    """The library, which fails where it is told to. Notes what it was asked for."""

    def __init__(self, fails: str, error: BaseException | None):
        super().__init__(seen=[], Settings=dict, url=None, hang=threading.Event())
        self.fails, self.error = fails, error

    def _do(self, what: str, *values: Any) -> None:
        self.seen.append((what, *values))
        if what == self.fails:
            if self.error is None:
                self.hang.wait(60)
            else:
                raise self.error

    def init(self, **settings: Any) -> FakeWandb:
        self._do("init", settings["mode"])
        return self

    def define_metric(self, *names: str, step_metric: str) -> None:
        assert (names, step_metric) == (("*",), "step")

    def log(self, values: dict[str, Any]) -> None:
        self._do("log", values["step"])

    def finish(self) -> None:
        self._do("finish")

    def teardown(self) -> None:
        self._do("teardown")


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    values = recipe_values(tmp_path)
    values["log"]["wandb_project"] = "test"
    return validate(PretrainConfig, values, "test")


def record_three_steps(config: PretrainConfig) -> list[int]:
    recorder = RunRecorder(config.output_dir, 0, 3, 0, open_trackers(config, 0))
    for step in (1, 2, 3):
        recorder.record("heldout", step, {"ce": 1.0})
    recorder.close("finished", 3, "done")
    return [record["step"] for record in read_metrics(config.output_dir / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("fails", "error", "says"),
    [
        ("init", RuntimeError("no key\nat all"), "fails (RuntimeError: no key at all)"),
        ("init", SystemExit(1), "fails (SystemExit: 1)"),
        ("log", ConnectionResetError("Connection lost"), "fails (Connection lost)"),
        ("finish", BrokenPipeError("gone"), "fails (gone)"),
        ("log", None, "has not finished within 0 seconds"),
        ("finish", None, "has not finished within 0 seconds"),
    ],
)
def test_a_failure_is_one_warning(
    config: PretrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails: str,
    error: BaseException | None,
    says: str,
) -> None:
    fake = FakeWandb(fails, error)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    if error is None:
        monkeypatch.setattr(service, "_CLOSE_SECONDS", 0.2)
        monkeypatch.setattr(service, "_KILLED_SECONDS", 0.1)
    assert record_three_steps(config) == [1, 2, 3]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == [f"warning: log.wandb_project: Weights & Biases {says}; metrics.jsonl has all numbers"]
    if error is not None:
        assert fake.seen[-1] == ("teardown",), "or it would do so when Python ends, with a traceback"
        assert [what for what, *_ in fake.seen].count(fails) == 1, "it rests after a failure"
    fake.hang.set()


def test_an_empty_mode_is_none(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "")
    fake = FakeWandb("nothing", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    record_three_steps(config)
    assert fake.seen == [("init", "offline"), ("log", 1), ("log", 2), ("log", 3), ("finish",), ("teardown",)]


def test_the_status_is_written_before_trackers_are_closed(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    fake = FakeWandb("nothing", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(fake, "finish", lambda: states.append((config.output_dir / "status.json").read_text()))
    record_three_steps(config)
    assert '"finished"' in states[0]


def test_tensorboard_of_any_failure_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("Descriptors cannot be created directly")

    monkeypatch.setattr(pytest.importorskip("torch.utils.tensorboard"), "SummaryWriter", fail)
    board = TensorBoard(tmp_path, step=0)
    board.add({"loss": 1.0}, 1)
    board.close()
    assert capsys.readouterr().err.count("cannot be written (TypeError: Descriptors cannot") == 1
