"""A training step and sampling on a fake CUDA device: one device, no waiting, no more work than before."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorDeviceMismatchError

from benchmarks.fake_backward import backward
from benchmarks.public_way import PlainViT
from benchmarks.step_contenders import Contestants, recipe
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.flops import FORWARD_AND_BACKWARD, forward_flops, projector_flops
from mepa_ds.objective.objective import ModelInputs, PretrainingObjective
from tests.benchmarks.importing import load_benchmark

WRITE = "python benchmarks/fake_cuda.py --write"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("fake_device", monkeypatch)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("fake_cuda", monkeypatch)


def small() -> PretrainConfig:
    """A recipe whose gradients a CPU computes at once."""
    config = recipe("nano", 2, "bf16")
    model = config.model.model_copy(update={"scales": (1, 2, 3, 4), "codebook_size": 64})
    alignment = config.objective.alignment
    assert alignment is not None
    alignment = alignment.model_copy(update={"scales": (2, 3), "projector_hidden": 32})
    objective = config.objective.model_copy(update={"alignment": alignment, "router_z_weight": 1e-3})
    return config.model_copy(update={"model": model, "objective": objective})


def test_the_graph_is_walked_as_by_pytorchs_engine() -> None:
    """Gradients of the whole objective, on tensors with data: equal to 1e-6 of the largest."""
    config = small()
    schedule = config.model.schedule
    generator = torch.Generator().manual_seed(0)
    objective = PretrainingObjective(NextScaleTransformer(config.model), config.objective, 24)
    inputs = ModelInputs(
        labels_B=torch.tensor([3, 10]),
        inputs_BLZ=torch.randn(2, schedule.num_tokens - 1, config.model.code_width, generator=generator),
        tokens_BL=torch.randint(64, (2, schedule.num_tokens), generator=generator),
        features_BNP=torch.randn(2, 16, 24, generator=generator),
    )
    objective(inputs).total.backward()
    other = copy.deepcopy(objective)
    other.zero_grad()
    backward(other(inputs).total)
    for (name, expected), found in zip(objective.named_parameters(), other.parameters(), strict=True):
        assert expected.grad is not None
        assert found.grad is not None
        tolerance = 1e-6 * max(expected.grad.abs().max().item(), 1e-6)
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=tolerance, msg=name)


class _Faulty(nn.Module):
    """A layer with the mistakes that a CPU does not show."""

    def __init__(self, fault: str):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 8, device="cuda"))
        self.fault = fault

    def forward(self, x_TC: Tensor) -> Tensor:
        y_TC = x_TC @ self.weight
        if self.fault == "made on the CPU":
            return y_TC + torch.arange(8)
        if self.fault == "size by data":
            return y_TC[y_TC.sum(-1) > 0]
        if self.fault == "read back":
            return y_TC * y_TC.sum().item()
        if self.fault == "list":
            return y_TC * sum(y_TC[0].tolist())
        if self.fault == "branch":
            return y_TC if y_TC.isfinite().all() else y_TC * 0
        if self.fault == "copied back":
            return y_TC + y_TC.detach().sum(0).cpu().to("cuda", non_blocking=True)
        if self.fault == "copied there":
            return y_TC + torch.ones(8).to("cuda")
        return y_TC + torch.ones(8).pin_memory().to("cuda", non_blocking=True)


@pytest.mark.parametrize("fault", ["made on the CPU", "size by data"])
def test_what_a_gpu_would_refuse_raises(device: ModuleType, fault: str) -> None:
    with device.fake_cuda(), pytest.raises((FakeTensorDeviceMismatchError, DynamicOutputShapeException, RuntimeError)):
        _Faulty(fault)(torch.empty(4, 8, device="cuda"))


@pytest.mark.parametrize("fault", ["read back", "list", "branch", "copied back", "copied there", "none"])
def test_waits_for_the_device_are_seen(device: ModuleType, fault: str) -> None:
    with device.fake_cuda(), device.Counter() as counter:
        backward(_Faulty(fault)(torch.empty(4, 8, device="cuda")).sum())
    assert sum(counter.work.waits.values()) == (fault != "none")
    assert counter.work.operators["gemm"] == 2, "the product, and the gradient of its weight"
    assert counter.work.flops == 2 * 2 * 4 * 8 * 8


def test_a_gradient_on_another_device_raises(device: ModuleType) -> None:
    class Elsewhere(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return torch.ones(8)

    with device.fake_cuda():
        x = torch.empty(8, device="cuda", requires_grad=True)
        with pytest.raises(RuntimeError, match="a gradient is on cpu"):
            backward(Elsewhere.apply(x).sum())


def test_traffic_by_hand(device: ModuleType) -> None:
    """Bytes of an elementwise operator, of an expanded operand, of a product and of gathered rows."""
    with device.fake_cuda():
        x, row, index = torch.empty(6, 4, device="cuda"), torch.empty(4, device="cuda"), torch.empty(2, device="cuda")
        index = index.long()
        with device.Counter() as counter:
            _ = x * 2 + row.expand(6, 4)
            assert counter.work.bytes == {"elementwise": 2 * 96 + (96 + 16 + 96)}
            _ = x.T[1:] @ x.view(6, 4)
            assert counter.work.bytes["gemm"] == 72 + 96 + 48
            _ = x.index_select(0, index)
            assert counter.work.bytes["index"] == 2 * 32
            row.mul_(2)
            torch.add(row, row, out=row)
            torch._foreach_add_([row, row], 1)
            assert counter.work.bytes["elementwise"] == 400 + (16 + 16) + (32 + 16)
            assert counter.work.bytes["optimizer"] == 2 * 32
            row.copy_(x[0])
            assert counter.work.bytes["copy"] == 16 + 16
    assert sum(counter.work.operators.values()) == 8, "views and slices are no kernels"


@pytest.mark.parametrize(
    "changes",
    [{"router": "smoe"}, {"router": "token", "renormalize": True}, {"bias_rate": 1e-3, "shared_expert": False}, None],
    ids=str,
)
def test_no_variant_of_the_model_waits(benchmark: ModuleType, changes: dict[str, Any] | None) -> None:
    """Dropless training; the grouped products need no counts on the host."""
    contestants = Contestants("nano", 2, "bf16", torch.device("cpu"))
    moe = contestants.config.model.moe
    assert moe is not None
    moe = None if changes is None else moe.model_copy(update=changes)
    variant = {"moe": moe, "shared_adaln": moe is None, "qk_norm": moe is not None}
    model = contestants.config.model.model_copy(update=variant)
    objective = contestants.config.objective.model_copy(update={"router_z_weight": 1e-3})
    config = contestants.config.model_copy(update={"model": model, "objective": objective})
    phases = benchmark.trace_training(config, contestants.batch)
    assert {phase: dict(work.waits) for phase, work in phases.items() if work.waits} == {}


@pytest.mark.parametrize("model", ["nano=4", "mepa-d16=48"])
def test_a_step_does_no_more_work_than_before_and_waits_for_nothing(benchmark: ModuleType, model: str) -> None:
    name, _, batch = model.partition("=")
    found = benchmark.as_json(benchmark.trace(name, int(batch)))
    waits = {phase: sums["waits_in"] for phase, sums in found.items() if phase != "sampling" and sums["waits"]}
    assert waits == {}, "the host waits for the device within a training step"
    config = recipe(name, int(batch), "bf16")
    alignment = config.objective.alignment
    assert alignment is not None
    flops = forward_flops(config.model) + projector_flops(config.model, alignment, PlainViT.WIDTH)
    counted = found["forward"]["flops"] + found["backward"]["flops"]
    # Flash attention's backward pass computes its scores again; guidance's matrices and one-hot products are small.
    assert counted == pytest.approx(FORWARD_AND_BACKWARD * flops * int(batch), rel=0.03)
    kept = benchmark.read_figure()
    if not kept:
        pytest.skip(f"the figure was made with another PyTorch than {benchmark.release()}")
    grown = list(benchmark.growth({model: found}, kept))
    assert grown == [], f"more work on a GPU; if it must be, `{WRITE} --allow-growth` keeps the new figure"


def test_the_figure_is_kept_downwards(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "figure.json"
    monkeypatch.setattr(benchmark, "FIGURE", figure)

    def write(elements: int, *options: str) -> int:
        work = benchmark.Work()
        work.operators["gemm"], work.bytes["gemm"] = 1, elements
        work.waits["mepa_ds/here.py:there"] = 2
        monkeypatch.setattr(benchmark, "trace", lambda model, batch: {"forward": work})
        monkeypatch.setattr("sys.argv", ["fake_cuda.py", "--models", "nano=1", "--write", *options])
        benchmark.main()
        kept: int = json.loads(figure.read_text())["models"]["nano=1"]["forward"]["bytes"]
        return kept

    assert [write(9), write(7)] == [9, 7]
    assert "wait in mepa_ds/here.py:there" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nano=1, forward: bytes were 7, and are 8"):
        write(8)
    assert write(8, "--allow-growth") == 8
    monkeypatch.setattr("sys.argv", ["fake_cuda.py", "--models", "nano"])
    with pytest.raises(SystemExit, match="expected MODEL=BATCH such as mepa-d16=48, got 'nano'"):
        benchmark.main()
