"""Parts of training by themselves: randomness, parameter groups, progressive lengths, MFU, records on a full disk."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mepa_ds import distributed
from mepa_ds.config.base import validate
from mepa_ds.config.model import ModelConfig
from mepa_ds.config.objective import AlignmentConfig, ObjectiveConfig
from mepa_ds.config.pretrain import LogConfig
from mepa_ds.data.training import TrainingBatch
from mepa_ds.engine.optimizer import has_decay
from mepa_ds.errors import UserError
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective import flops
from mepa_ds.objective.objective import PretrainingObjective
from mepa_ds.pretrain.inputs import InputMaker
from mepa_ds.runtime.metrics import MetricsWriter, read_metrics
from mepa_ds.runtime.schedule import scales_in_step
from mepa_ds.runtime.trackers.tensorboard import TensorBoard
from mepa_ds.scales import ScaleSchedule
from tests.tiny_run import CLASSES, CODE_WIDTH, CODEBOOK, NUM_TOKENS, SCALES, make_tokenizer

SIZES = {"depth": 4, "width": 32, "num_heads": 2, "num_classes": CLASSES, "scales": list(SCALES)}
SIZES |= {"codebook_size": CODEBOOK, "code_width": CODE_WIDTH, "moe": {"num_experts": 4}}


def model_config(**values: object) -> ModelConfig:
    return validate(ModelConfig, SIZES | values, "test")


def batch_at(positions: range) -> TrainingBatch:
    count = len(positions)
    return TrainingBatch(
        tokens_BL=torch.zeros(count, NUM_TOKENS, dtype=torch.int64),
        labels_B=torch.ones(count, dtype=torch.int64),
        positions_B=torch.tensor(positions),
        weight_B=torch.ones(count),
        keys=tuple(str(position) for position in positions),
        next_position=positions.stop,
    )


def test_labels_and_branches_are_dropped_at_their_rates(tmp_path: Path) -> None:
    """10 % of the labels; branches at a rate that grows from 0 to drop_path over the blocks, kept ones scaled up."""
    config = model_config(class_dropout=0.1, drop_path=0.3)
    inputs = InputMaker(config, make_tokenizer(tmp_path).quantizer, 0, torch.device("cpu"))
    count = 20_000
    made = inputs.training(batch_at(range(count)))
    dropped = (made.labels_B == CLASSES).double().mean()
    deviation = math.sqrt(0.1 * 0.9 / count)
    assert dropped == pytest.approx(0.1, abs=4 * deviation)
    assert (made.labels_B[made.labels_B != CLASSES] == 1).all()
    assert made.branch_scale_D2B is not None
    for rate, scales_2B in zip((0, 0.1, 0.2, 0.3), made.branch_scale_D2B, strict=True):
        assert sorted(scales_2B.unique().tolist()) == pytest.approx([0, 1 / (1 - rate)] if rate else [1])
        for scales_B in scales_2B:
            assert (scales_B == 0).double().mean() == pytest.approx(rate, abs=4 * math.sqrt(0.25 / count))
    both = (made.branch_scale_D2B[3] == 0).all(0).double().mean()
    assert both == pytest.approx(0.09, abs=0.01), "the branches of a block are dropped independently"
    # A function of the position: any other split of the stream gives the same.
    part = inputs.training(batch_at(range(100, 200)))
    assert part.labels_B.equal(made.labels_B[100:200])
    assert part.branch_scale_D2B is not None
    assert part.branch_scale_D2B.equal(made.branch_scale_D2B[:, :, 100:200])
    kept = inputs.evaluation(batch_at(range(100)))
    assert (kept.labels_B == 1).all()
    assert kept.branch_scale_D2B is None


def test_the_parameters_without_weight_decay_are_vars() -> None:
    """VAR's list: biases, vectors, start and position, scale and temperatures; class embedding and matrices decay."""
    for shared_adaln in (False, True):
        config = model_config(depth=1, shared_adaln=shared_adaln)
        objective = PretrainingObjective(NextScaleTransformer(config), ObjectiveConfig(alignment=None), None)
        decaying = {name.removeprefix("transformer.") for name, p in objective.named_parameters() if has_decay(name, p)}
        assert decaying == {
            "word_embed.weight",
            "class_embed.weight",
            "shared_adaln.weight" if shared_adaln else "blocks.0.adaln.weight",
            "blocks.0.attention.qkv.weight",
            "blocks.0.attention.proj.weight",
            "blocks.0.ffn.router.gate.weight",
            "blocks.0.ffn.experts.fc1_weight",
            "blocks.0.ffn.experts.fc2_weight",
            "blocks.0.ffn.shared.fc1.weight",
            "blocks.0.ffn.shared.fc2.weight",
            "head_adaln.weight",
            "head.weight",
        }


def test_mfu_is_the_share_of_all_gpus_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "uses_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    peak = flops.peak_flops_per_second("bf16")
    assert peak == 989e12
    assert flops.peak_flops_per_second("fp32") is None
    # 4 GPUs that do 989e12 operations a second each for 2 s, at 40 % of it.
    assert flops.mfu(0.4 * 989e12 * 4 * 2, 2.0, peak, 4) == pytest.approx(0.4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a toaster")
    assert flops.peak_flops_per_second("bf16") is None


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA B200", 2250),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla V100-SXM2-32GB", 125),
        ("AMD Instinct MI300X", 1307),
        ("AMD Instinct MI250X", 191.5),
        ("NVIDIA L4", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_the_peak_of_every_device_by_its_full_name(
    monkeypatch: pytest.MonkeyPatch, name: str, teraflops: float | None
) -> None:
    """Names as drivers give them, dense bf16 peaks as the vendors' data sheets do."""
    monkeypatch.setattr(distributed, "uses_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    for precision in ("bf16", "fp16"):
        assert flops.peak_flops_per_second(precision) == (None if teraflops is None else teraflops * 1e12)


def test_operations_are_those_of_all_products() -> None:
    """Every matrix product of a forward pass as (rows, inner, columns), with 3 experts of hidden 128 a token."""
    L, C = 14, 32
    block = [(L, C, 3 * C), (L, C, C), (1, C, 6 * C), (L, C, 4), *[(L, C, 128), (L, 128, C)] * 3]
    for length, end in ((1, 1), (4, 5), (9, 14)):
        block += [(length, C, end), (length, end, C)]
    around = [(L - 1, CODE_WIDTH, C), (1, C, 2 * C), (L, C, CODEBOOK)]
    products = 2 * block + around
    assert flops.forward_flops(model_config(depth=2)) == sum(2 * m * n * k for m, n, k in products)
    alignment = AlignmentConfig(scales=(1, 2), projector_hidden=48)
    projector = [(5, C, 48), (5, 48, 48), (5, 48, 6)]
    assert flops.projector_flops(model_config(), alignment, 6) == sum(2 * m * n * k for m, n, k in projector)


def test_records_that_do_not_fit_on_the_disk_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    file = writer._file

    class Full:
        def write(self, content: bytes) -> int:
            if len(content) > 5:
                return file.write(content[:5])  # the last room there is
            raise OSError(28, "No space left on device")

    writer.write({"step": 1})
    monkeypatch.setattr(writer, "_file", Full())
    for step in (2, 3):
        writer.write({"step": step})
    assert capsys.readouterr().err.count("cannot be written") == 1, "once, not at every record"
    monkeypatch.setattr(writer, "_file", file)
    writer.write({"step": 4})
    writer.close()
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [{"step": step} for step in (1, 2, 3, 4)]


def test_a_rewind_needs_no_room_and_keeps_what_is_unwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full, and the last record on it torn, when a run goes back to its first 3 records."""
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    file = writer._file
    writer.write({"step": 1})

    class Full:
        def write(self, content: bytes) -> int:
            if file.tell() < 20:
                return file.write(content[:5])
            raise OSError(28, "No space left on device")

        def truncate(self, size: int) -> int:
            return file.truncate(size)

    monkeypatch.setattr(writer, "_file", Full())
    for step in (2, 3, 4):
        writer.write({"step": step})
    writer.write({"step": 5, "message": "a warning"})
    assert writer.rewind(3, keep_warnings=True) == 4
    monkeypatch.setattr(writer, "_file", file)
    writer.write({"step": 4})
    expected = [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 5, "message": "a warning"}, {"step": 4}]
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == expected
    assert writer.rewind(1, keep_warnings=False) == 1
    writer.close()
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [{"step": 1}]


def test_tensorboard_on_a_full_disk_is_given_up_until_a_rewind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[int] = []

    class Writer:
        def __init__(self, directory: str, purge_step: int):
            written.append(-purge_step)

        def add_scalar(self, key: str, value: float, step: int) -> None:
            if step == 2:
                raise OSError(28, "No space left on device")
            written.append(step)

    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    monkeypatch.setattr(tensorboard, "SummaryWriter", Writer)
    board = TensorBoard(tmp_path, step=0)
    for step in (1, 2, 3):
        board.add({"loss": 1.0}, step)
    board.rewind(1)
    board.add({"loss": 1.0}, 4)
    assert written == [-1, 1, -2, 4]
    assert capsys.readouterr().err.count("cannot be written ([Errno 28] No space left on device)") == 1


def test_milestones_are_checkpoints() -> None:
    with pytest.raises(UserError, match=r"keep_every \(1500\) must be a multiple of checkpoint_every \(1000\)"):
        validate(LogConfig, {"keep_every": 1500}, "log")


def test_scales_join_evenly_over_the_first_share_of_the_steps() -> None:
    counts = [scales_in_step(0.5, 10, step, 1000) for step in range(1000)]
    assert [counts.count(scales) for scales in range(5, 11)] == [100] * 5 + [500]
    assert counts == sorted(counts)
    assert [scales_in_step(None, 10, step, 1000) for step in (0, 999)] == [10, 10]
    assert [scales_in_step(1.0, 3, step, 4) for step in range(5)] == [2, 2, 2, 2, 3]


@pytest.mark.parametrize("num_scales", [1, 2, 3])
def test_fewer_scales_are_the_beginning_of_all(tmp_path: Path, num_scales: int) -> None:
    """Logits, losses and sums of the first k scales are those of the whole forward pass, cut there: it is causal."""
    schedule = ScaleSchedule(SCALES)
    end = schedule.bounds[num_scales - 1][1]
    torch.manual_seed(0)
    config = model_config(drop_path=0.3)
    objective = PretrainingObjective(
        NextScaleTransformer(config), ObjectiveConfig(alignment=AlignmentConfig(scales=(2, 3), projector_hidden=8)), 6
    )
    objective.init_weights(0)
    inputs = InputMaker(config, make_tokenizer(tmp_path).quantizer, 0, torch.device("cpu"))
    batch = replace(batch_at(range(4)), tokens_BL=torch.randint(CODEBOOK, (4, NUM_TOKENS)))
    whole, part = inputs.training(batch), inputs.training(batch, num_scales)
    whole.features_BNP = part.features_BNP = torch.randn(4, 9, 6)
    assert part.tokens_BL.shape[1] == end
    model = objective.transformer
    logits_BLV, cut_BLV = (
        model(i.labels_B, i.inputs_BLZ, branch_scale_D2B=i.branch_scale_D2B).logits_BLV for i in (whole, part)
    )
    torch.testing.assert_close(cut_BLV, logits_BLV[:, :end], atol=1e-5, rtol=1e-5)
    losses, all_losses = objective(part), objective(whole)
    expected = F.cross_entropy(logits_BLV[:, :end].flatten(0, 1), batch.tokens_BL[:, :end].flatten())
    assert losses.terms["ce"].item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(losses.scores.ce_sum_S[:num_scales], all_losses.scores.ce_sum_S[:num_scales])
    assert losses.scores.tokens_S.tolist() == [4 * n if s < num_scales else 0 for s, n in enumerate(schedule.lengths)]
    if num_scales == 1:
        assert losses.terms["alignment"] == 0
    losses.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters() if p.requires_grad)
    if num_scales == 3:
        assert losses.total.equal(all_losses.total)
    assert flops.forward_flops(config, num_scales) <= flops.forward_flops(config)
    assert (flops.forward_flops(config, num_scales) == flops.forward_flops(config)) == (num_scales == 3)


def test_inputs_that_end_within_a_scale_are_refused() -> None:
    model = NextScaleTransformer(model_config())
    with pytest.raises(UserError, match=r"inputs: expected \(B, L - l0, code width\) = \(2, 13, 4\), got \(2, 6, 4\)"):
        model(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 6, CODE_WIDTH))
