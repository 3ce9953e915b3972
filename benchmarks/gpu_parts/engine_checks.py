"""The engine on one rank of this device (NCCL on a GPU, gloo on a CPU): inputs, compiled blocks, saving and loading."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_parts.model_checks import CPU, TEACHER_WIDTH, Found, moved, nano
from benchmarks.gpu_parts.timing import check_close
from benchmarks.step_contenders import Contestants, recipe
from mepa_ds import distributed
from mepa_ds.checkpoint.files import find_damage, list_checkpoints
from mepa_ds.checkpoint.state import RunState
from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.pretrain.checkpointing import Kept, RunCheckpoints
from mepa_ds.pretrain.inputs import InputMaker

RATE = 1e-3


def precision(device: torch.device) -> str:
    return "bf16" if device.type == "cuda" else "fp32"


def start_rank() -> None:
    """Makes this process a rank alone, if it is none yet. DeepSpeed holds on to the group, so it stays to the end."""
    distributed.start(distributed.read_launch())


def training_inputs(device: torch.device) -> Found:
    """A stored batch with int8 features as the model's inputs: labels and stochastic depth equal, all else close."""
    contestants = Contestants("nano", 4, "fp32", CPU)
    config, batch, quantizer = contestants.config, contestants.batch, contestants.quantizer
    here = InputMaker(config.model, quantizer, 0, CPU).training(batch)
    there = InputMaker(config.model, copy.deepcopy(quantizer), 0, device).training(batch)
    found: Found = {}
    for name, expected in vars(here).items():
        if isinstance(expected, Tensor):
            exact = not expected.is_floating_point() or name == "branch_scale_D2B"
            found[name] = check_close(name, vars(there)[name], expected, 0 if exact else 1e-4)
    return found


def _train(engine: PretrainEngine, steps: int, device: torch.device) -> list[float]:
    """Losses of steps on one batch."""
    _, _, inputs = nano(batch=2)
    inputs, losses = moved(inputs, device), []
    for _ in range(steps):
        engine.begin_step()
        found = engine.forward(inputs)
        losses.append(found.total.item())
        engine.backward(found)
        engine.update(RATE)
    return losses


def compiled(device: torch.device) -> Found:
    """Losses of three steps with `parallel.compile`, against those without it."""
    start_rank()
    losses = {}
    for compiles in (False, True):
        # On a CPU compiling takes longer than all other checks together.
        with torch.compiler.set_stance("default" if device.type == "cuda" else "force_eager"):
            config = recipe("nano", 2, precision(device), compiled=compiles)
            losses[compiles] = _train(PretrainEngine(config, TEACHER_WIDTH, device), 3, device)
    error = check_close("losses", torch.tensor(losses[True]), torch.tensor(losses[False]), 5e-3)
    return {"losses": error, "compiled": losses[True], "plain": losses[False]}


def saved_and_loaded(device: torch.device) -> Found:
    """ZeRO-2: three steps, a checkpoint, two more; the same two in a new engine from the checkpoint.

    What is loaded equals what was saved to the bit; the losses after it to a per cent (a GPU's sums have no fixed
    order), and they fall.
    """
    config = recipe("nano", 2, precision(device))
    start_rank()
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as directory:
        engine = PretrainEngine(config, TEACHER_WIDTH, device)
        losses = _train(engine, 3, device)
        saved = {kind: [flat.cpu().clone() for flat in flats] for kind, flats in engine.flats(engine.kinds).items()}
        checkpoints = RunCheckpoints(engine, Path(directory), Kept(1))
        state = RunState(recipe=json.loads(config.model_dump_json()))
        state.step = 3
        checkpoints.save(state)
        (written,) = checkpoints.settle()
        assert written.error is None, written.error
        (path,) = list_checkpoints(checkpoints.directory)
        assert find_damage(path) is None, find_damage(path)
        after = _train(engine, 2, device)
        another = PretrainEngine(config.model_copy(update={"seed": 1}), TEACHER_WIDTH, device)
        loaded = RunCheckpoints(another, Path(directory), Kept(1)).load_newest(lambda path, state: None)
        assert loaded is not None
        assert loaded.state.step == 3
        for kind, flats in another.flats(another.kinds).items():
            for ours, theirs in zip(flats, saved[kind], strict=True):
                assert torch.equal(ours.cpu(), theirs), f"{kind} is not what was saved"
        again = _train(another, 2, device)
    assert after[-1] < losses[0], f"the loss does not fall: {[*losses, *after]}"
    error = check_close("losses after the checkpoint", torch.tensor(again), torch.tensor(after), 0.01)
    return {"losses": [*losses, *after], "again": again, "error": error, "write_seconds": written.write_seconds}
