"""What trackers get: a few numbers that say how a run is doing, all of them on request, pictures with both."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mepa_ds.runtime.recorder import RunRecorder
from mepa_ds.runtime.trackers.selection import Chosen, load_maps, scalars
from mepa_ds.runtime.trackers.tracker import Pixels
from tests.tiny_run import ROOT, recipe_values

TRAIN = {"loss": 1.0, "ce": 2.0, "ce_scale": [3.0, "nan"], "ranks": {"own_seconds": {"max": 4.0}}, "applied": True}
ROUTING = {"layers": {"0": {"load": [0.5, 0.5], "load_scale": [[1.0, 0.0], [0.5, 0.5]]}}, "collapsed_experts": 0}


class Seen:
    """A tracker that notes what it gets."""

    def __init__(self) -> None:
        self.numbers: list[dict[str, float]] = []
        self.pictures: list[tuple[str, tuple[int, ...], int]] = []

    def add(self, scalars: dict[str, float], step: int) -> None:
        self.numbers.append({"step": step, **scalars})

    def add_picture(self, name: str, pixels_HW3: Pixels, step: int) -> None:
        self.pictures.append((name, pixels_HW3.shape, step))

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("short", {"train/loss": 1.0, "train/ce": 2.0}),
        (
            "all",
            {
                "train/loss": 1.0,
                "train/ce": 2.0,
                "train/ce_scale/1": 3.0,
                "train/ranks/own_seconds/max": 4.0,
                "train/applied": True,
            },
        ),
    ],
)
def test_short_and_all(chosen: Chosen, expected: dict[str, float]) -> None:
    assert scalars("train", TRAIN, chosen) == expected
    assert scalars("written", {"write_seconds": 1.0}, "short") == {}
    assert scalars("score", {"fid": 9.0, "protocol": {"seed": 0}}, "short") == {"score/fid": 9.0}


def test_heat_maps_show_shares_against_an_even_one() -> None:
    maps = load_maps(ROUTING)
    by_scale = maps["experts/by_scale"][::24, ::24]
    red, blue, white = [178, 24, 43], [33, 102, 172], [255, 255, 255]
    assert by_scale.tolist() == [[red, blue], [white, white]]
    assert maps["experts/by_layer"][::24, ::24].tolist() == [[white, white]]


def test_pictures_come_with_their_records(tmp_path: Path) -> None:
    seen = Seen()
    (tmp_path / "samples").mkdir()
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "samples/step_00000002.png")
    recorder = RunRecorder(tmp_path, 0, 4, 0, [seen])
    recorder.record("heldout", 1, {"ce": 1.0})
    recorder.record("routing", 2, ROUTING)
    recorder.record("heldout", 2, {"ce": 1.0})
    recorder.record("samples", 2, {"path": "samples/step_00000002.png", "classes": [0]})
    recorder.record("samples", 3, {"path": "samples/gone.png", "classes": [0]})
    recorder.close("finished", 4, "done")
    assert seen.pictures == [
        ("experts/by_scale", (48, 48, 3), 2), ("experts/by_layer", (24, 48, 3), 2), ("samples", (4, 6, 3), 2)
    ]  # fmt: skip
    assert [numbers["step"] for numbers in seen.numbers] == [1, 2, 2]


_TRACKED = """
import json, socket, sys
from pathlib import Path
import numpy as np
from mepa_ds.config.base import validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.runtime.trackers.opening import open_trackers

def refuse(self, address):
    if self.family != socket.AF_UNIX:
        print("a connection to", address)
        raise OSError("no network")
socket.socket.connect = refuse
config = validate(PretrainConfig, json.loads(sys.argv[1]), "test")
config.output_dir.mkdir(exist_ok=True)
for steps in ((1, 2), (3,)):
    (tracker,) = open_trackers(config, 0)
    for step in steps:
        tracker.add({"train/loss": 1.0 / step}, step)
        tracker.add_picture("samples", np.zeros((4, 4, 3), np.uint8), step)
    tracker.close()
"""


def test_trackio_needs_no_network_and_says_nothing(tmp_path: Path) -> None:
    """Two starts are one run."""
    pytest.importorskip("trackio")
    values: dict[str, Any] = recipe_values(tmp_path)
    values["log"]["trackio_project"] = "test"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(tmp_path / "db"), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", _TRACKED, json.dumps(values)]
    end = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (end.returncode, end.stdout, end.stderr) == (0, "", "")
    with sqlite3.connect(tmp_path / "db/test.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    values_of = [(step, json.loads(metrics)) for _, step, metrics in rows]
    losses = {step: values["train/loss"] for step, values in values_of if "train/loss" in values}
    assert losses == {1: 1.0, 2: 0.5, 3: 1 / 3}
    assert len({name for name, _, _ in rows}) == 1
