"""parallel.compile: the same training, through torch.compile (Inductor, which needs a C++ compiler on a CPU)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mepa_ds.config.base import load_config
from mepa_ds.config.pretrain import PretrainConfig
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


def test_compiling_and_recomputing_exclude_each_other(tmp_path: Path) -> None:
    recipe = make_run(tmp_path, "parallel.compile=true", "parallel.activation_checkpointing=blocks")
    with pytest.raises(UserError, match=r"compile and activation_checkpointing \(blocks\) exclude each other"):
        load_config(PretrainConfig, recipe)
