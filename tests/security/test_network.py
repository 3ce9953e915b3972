"""Nothing asks the network at run time: every connection but to this machine itself is refused, and would fail here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mepa_ds.images.pictures import save_png
from tests.tiny_run import ROOT, make_run

# Python runs this at the start of each process that has its folder in PYTHONPATH: subprocesses too.
GUARD = """
import ipaddress, os, socket, sys

def _is_here(host):
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False

def _check(event, arguments):
    host = None
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    host = host.decode() if isinstance(host, bytes) else host
    if host is not None and not _is_here(host):
        with open(os.environ["NETWORK_LOG"], "a") as log:
            log.write(f"{event} {host} {' '.join(sys.argv)[:200]}\\n")
        raise OSError(f"no network in this test: {host}")

sys.addaudithook(_check)
"""
OFFLINE_WORDS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE", "WANDB_DISABLED")


@pytest.fixture
def guarded(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    environment = {name: value for name, value in os.environ.items() if name not in OFFLINE_WORDS}
    path = os.pathsep.join([str(tmp_path / "guard"), str(ROOT)])
    return {**environment, "PYTHONPATH": path, "NETWORK_LOG": str(tmp_path / "asked.txt"), "CUDA_VISIBLE_DEVICES": ""}


def _run(environment: dict[str, str], *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=250
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_guard_sees_who_asks(guarded: dict[str, str]) -> None:
    code = "import socket\ntry: socket.create_connection(('192.0.2.1', 80), 1)\nexcept OSError as error: print(error)"
    assert "no network" in _run(guarded, "-c", code)
    code = "import urllib.request\ntry: urllib.request.urlopen('http://example.invalid')\nexcept OSError: print('no')"
    _run(guarded, "-c", f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}])")
    asked = Path(guarded["NETWORK_LOG"]).read_text()
    assert "192.0.2.1" in asked
    assert "example.invalid" in asked


@pytest.mark.processes
@pytest.mark.timeout(900)
def test_training_sampling_scoring_and_precomputing_ask_no_network(guarded: dict[str, str], tmp_path: Path) -> None:
    recipe, run, samples = make_run(tmp_path), tmp_path / "run", tmp_path / "samples"
    _run(guarded, "-m", "mepa_ds", "pretrain", str(recipe), "train.steps=4", "log.evaluate_every=2")
    _run(guarded, "-m", "mepa_ds", "sample", "--run", str(run), "--classes", "0-2", "--out", str(samples))
    images = tmp_path / "images"
    for label in range(3):
        (images / str(label)).mkdir(parents=True)
        for number in range(6):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
            save_png(pixels, images / str(label) / f"{number}.png")
    sets = tmp_path / "sets"
    _run(guarded, "-m", "mepa_ds", "data", "build", "imagefolder", "--root", str(images), "--out", str(sets))
    _run(
        guarded, "-m", "mepa_ds", "data", "fit-teacher", "patch-pca", str(sets), "--out", str(tmp_path / "pca"),
        "--grid-side", "3", "--pixels-per-cell", "2", "--window", "2", "--width", "4",
    )  # fmt: skip
    _run(
        guarded, "-m", "mepa_ds", "data", "precompute", "features", str(sets), "--teacher", "patch-pca", "--weights",
        str(tmp_path / "pca"), "--out", str(tmp_path / "features"),
    )  # fmt: skip
    _run(
        guarded, "-m", "mepa_ds", "evaluate", str(images), "--reference", str(sets), "--features",
        f"patch-pca:{tmp_path / 'pca'}",
    )  # fmt: skip
    assert not Path(guarded["NETWORK_LOG"]).exists(), Path(guarded["NETWORK_LOG"]).read_text()
