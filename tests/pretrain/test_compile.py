"""parallel.compile: the same training, through torch.compile (Inductor, which needs a C++ compiler on a CPU)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mepa_ds.config.base import load_config
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.engine import compilation
from mepa_ds.engine.compilation import compiles
from mepa_ds.errors import UserError
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.weights.directories import read_state_dict
from tests.ranks import Ranks, finish
from tests.tiny_run import losses, make_run


def count_compiled_graphs() -> None:
    """Runs in each rank's process before the run: says what torch.compile has made when the process ends."""
    import torch._inductor.compile_fx as inductor

    original = inductor.compile_fx

    def compile_fx(*arguments: Any, **values: Any) -> Any:
        print("compiled a graph", flush=True)
        return original(*arguments, **values)

    inductor.compile_fx = compile_fx  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_a_compiled_run_has_the_losses_of_the_plain_one(tmp_path: Path) -> None:
    recipe = str(make_run(tmp_path, "train.steps=3", "log.evaluate_every=2", "parallel.ep_size=2"))
    finish([recipe, f"output_dir={tmp_path / 'plain'}"], 2, tmp_path / "plain.log")
    arguments = [recipe, f"output_dir={tmp_path / 'compiled'}", "parallel.compile=true"]
    with Ranks(arguments, 2, tmp_path / "compiled.log", count_compiled_graphs) as ranks:
        assert ranks.wait() == [0, 0], ranks.log.read_text()
    assert ranks.log.read_text().count("compiled a graph") >= 2, ranks.log.read_text()
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), atol=1e-5, rtol=0)
    heldout = [
        [record["ce"] for record in read_metrics(tmp_path / name / "metrics.jsonl") if record["event"] == "heldout"]
        for name in ("plain", "compiled")
    ]
    np.testing.assert_allclose(heldout[0], heldout[1], atol=1e-5)
    plain, compiled = (read_state_dict(tmp_path / name / "last") for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()


CPU, GPU = torch.device("cpu"), torch.device("cuda")
NO_COMPILER = "InductorError: No working C++ compiler found"


@pytest.mark.parametrize(
    ("wanted", "recompute", "device", "trouble", "expected"),
    [
        (None, "none", CPU, None, False),
        (None, "none", GPU, None, True),
        (None, "none", GPU, NO_COMPILER, False),
        (None, "blocks", GPU, None, False),
        (False, "none", GPU, None, False),
        (True, "none", CPU, None, True),
        (True, "none", GPU, NO_COMPILER, "error"),
    ],
)
def test_when_blocks_are_compiled(
    wanted: bool | None,
    recompute: Any,
    device: torch.device,
    trouble: str | None,
    expected: bool | str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compilation, "trouble_with_compiler", lambda _: trouble)
    if expected == "error":
        with pytest.raises(
            UserError, match=r"parallel.compile: torch.compile does not work on rank 0 \(Ind.*; install"
        ):
            compiles(wanted, recompute, device)
        return
    assert compiles(wanted, recompute, device) is expected
    falls_back = wanted is None and trouble is not None
    line = (
        f"parallel.compile: torch.compile does not work on rank 0 ({NO_COMPILER}): the blocks run uncompiled, which is"
    )
    assert capsys.readouterr().err == (f"{line} slower\n" if falls_back else "")


def test_a_machine_without_a_compiler_is_noticed(tmp_path: Path) -> None:
    code = "import torch; from mepa_ds.engine.compilation import trouble_with_compiler as trouble; "
    code += "print(trouble(torch.device('cpu')))"
    none_found = {"PATH": "/nowhere", "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | none_found, capture_output=True, text=True)
    assert re.fullmatch(r"\w+: .*No working C\+\+ compiler.*\n", result.stdout), result.stdout + result.stderr
    assert result.stderr == ""


def test_compiling_and_recomputing_exclude_each_other(tmp_path: Path) -> None:
    recipe = make_run(tmp_path, "parallel.compile=true", "parallel.activation_checkpointing=blocks")
    with pytest.raises(UserError, match=r"compile and activation_checkpointing \(blocks\) exclude each other"):
        load_config(PretrainConfig, recipe)
