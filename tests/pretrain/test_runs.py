"""Whole runs of pretrain.py on gloo ranks: layouts agree, resuming is exact, bad input is refused on every rank."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.weights.directories import read_state_dict
from tests.hardware import needs_fp16
from tests.ranks import Ranks, finish
from tests.tiny_run import ROOT, launch, losses, make_run, make_sets, make_tokenizer, write_recipe

STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, tokenizer and recipe of a tiny run."""
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    return folder


def run(folder: Path, name: str, *overrides: str, ranks: int = 1) -> Path:
    """A finished run in `folder/name`."""
    output = folder / name
    finish([str(folder / "recipe.yaml"), f"output_dir={output}", *overrides], ranks, folder / f"{name}.log")
    return output


@pytest.fixture(scope="module")
def single(folder: Path) -> Path:
    """The uninterrupted run of one process that all others are compared with."""
    return run(folder, "single")


def test_training_learns_and_records(single: Path) -> None:
    records = list(read_metrics(single / "metrics.jsonl"))
    train = [record for record in records if record["event"] == "train"]
    assert [record["step"] for record in train] == list(range(1, STEPS + 1))
    assert train[-1]["epoch"] == pytest.approx(STEPS * 8 / 40)
    heldout = [record["ce"] for record in records if record["event"] == "heldout"]
    assert heldout[1] < heldout[0] < np.log(16)
    routing = next(record for record in records if record["event"] == "routing")["layers"]
    assert sorted(routing) == ["0", "1"]
    assert np.sum(routing["0"]["load_scale"], axis=1) == pytest.approx([1, 1, 1], abs=1e-3)
    assert (single / "resolved.yaml").exists()


@pytest.mark.parametrize(("ranks", "ep_size", "accumulation"), [(2, 1, 1), (2, 2, 1), (2, 2, 2), (4, 2, 1)])
def test_every_layout_has_the_losses_of_one_process(
    folder: Path, single: Path, ranks: int, ep_size: int, accumulation: int
) -> None:
    settings = [f"parallel.ep_size={ep_size}", f"train.accumulation={accumulation}"]
    output = run(folder, f"ranks{ranks}_ep{ep_size}_ga{accumulation}", *settings, ranks=ranks)
    if accumulation > 1:  # the balance loss sees micro-batches
        single = folder / f"single_ga{accumulation}"
        if not single.exists():
            run(folder, single.name, f"train.accumulation={accumulation}")
    np.testing.assert_allclose(losses(output), losses(single), atol=1e-5, rtol=0)
    ours, theirs = (read_state_dict(path / "last") for path in (output, single))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-4, msg=f"{name} {{}}".format)


def on_a_machine_with_one_gpu() -> None:
    """Called in each rank. Whatever would start CUDA there fails."""
    del os.environ["MEPA_ACCELERATOR"]
    torch.cuda.device_count = lambda: int(os.environ.get("CUDA_VISIBLE_DEVICES") != "")
    torch.cuda.is_available = lambda: torch.cuda.device_count() > 0


def test_two_ranks_on_a_machine_with_one_gpu_use_the_cpu(folder: Path, single: Path) -> None:
    arguments = [str(folder / "recipe.yaml"), f"output_dir={folder / 'one_gpu'}", "train.steps=3"]
    with Ranks(arguments, 2, folder / "one_gpu.log", on_a_machine_with_one_gpu) as ranks:
        assert ranks.wait() == [0, 0], ranks.log.read_text()
    log = ranks.log.read_text()
    assert log.count("2 ranks, but 1 GPU on this machine: all ranks compute on the CPU, with gloo") == 1
    np.testing.assert_allclose(losses(folder / "one_gpu")[:2], losses(single)[:2], atol=1e-5, rtol=0)


def test_expert_parallelism_keeps_the_losses(folder: Path) -> None:
    """ep_size 2 against ep_size 1 on the same ranks: 20 steps in fp32."""
    outputs = [folder / f"ranks2_ep{ep_size}_ga1" for ep_size in (1, 2)]
    for ep_size, output in enumerate(outputs, start=1):
        if not output.exists():
            run(folder, output.name, f"parallel.ep_size={ep_size}", ranks=2)
    assert len(losses(outputs[0])) == STEPS
    np.testing.assert_allclose(losses(outputs[1]), losses(outputs[0]), atol=1e-5, rtol=0)


def cut_back(source: Path, target: Path, step: int) -> None:
    """`target` is `source` as it was when it was killed after the checkpoint of `step`."""
    shutil.copytree(source, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    shutil.rmtree(target / "last")


def test_a_resumed_run_is_the_uninterrupted_one(folder: Path, single: Path) -> None:
    cut_back(single, folder / "resumed", 10)
    output = run(folder, "resumed")
    assert losses(output) == losses(single)
    for name, tensor in read_state_dict(single / "last").items():
        assert torch.equal(read_state_dict(output / "last")[name], tensor), name


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param("parallel.precision=bf16", marks=pytest.mark.slow),
        pytest.param("parallel.precision=fp16", marks=needs_fp16),
        "zero1",
    ],
)
def test_other_precisions_and_zero_1_resume_exactly_too(folder: Path, setting: str) -> None:
    """fp16 with a loss scale that has fallen and is to rise: its state is part of the checkpoint."""
    if setting == "zero1":
        setting = f"parallel.deepspeed={ROOT / 'ds_configs' / 'zero1.json'}"
    name = setting[-5:].strip("=.")
    settings = [setting, "parallel.ep_size=2", "train.steps=12", "log.checkpoint_every=6"]
    if "fp16" in setting:
        settings.append("objective.ce_weight=10000")  # the first loss scales overflow
    whole = run(folder, f"whole_{name}", *settings, ranks=2)
    cut_back(whole, folder / f"cut_{name}", 6)
    cut = run(folder, f"cut_{name}", *settings, ranks=2)
    assert losses(cut) == losses(whole)
    if "fp16" in setting:
        assert not next(r for r in read_metrics(whole / "metrics.jsonl") if r["event"] == "train")["applied"]
    for key, tensor in read_state_dict(whole / "last").items():
        assert read_state_dict(cut / "last")[key].equal(tensor), key


@pytest.mark.parametrize(("ranks", "ep_size"), [(1, 1), (2, 1), (4, 4)])
def test_a_checkpoint_resumes_on_another_topology(folder: Path, single: Path, ranks: int, ep_size: int) -> None:
    """Written by 2 ranks at ep_size 2, masters, moments and data position included."""
    source = folder / "ranks2_ep2_ga1"
    if not source.exists():
        run(folder, "ranks2_ep2_ga1", "parallel.ep_size=2", ranks=2)
    name = f"moved_{ranks}_{ep_size}"
    cut_back(source, folder / name, 10)
    output = run(folder, name, f"parallel.ep_size={ep_size}", ranks=ranks)
    np.testing.assert_allclose(losses(output), losses(single), atol=1e-5, rtol=0)


def test_a_finished_run_says_so(folder: Path, single: Path) -> None:
    before = (single / "metrics.jsonl").read_text().count('"train"')
    log = finish([str(folder / "recipe.yaml"), f"output_dir={single}"], 1, folder / "again.log")
    assert "resumed from" in log
    assert f"done: {STEPS} steps" in log
    assert (single / "metrics.jsonl").read_text().count('"train"') == before


def test_export_gives_the_weights_without_deepspeed(folder: Path, single: Path) -> None:
    from mepa_ds.cli.export import main

    main([str(single / "checkpoints" / f"step_{STEPS:08d}"), str(folder / "exported")])
    exported, last = NextScaleTransformer.load(folder / "exported"), NextScaleTransformer.load(single / "last")
    for ours, theirs in zip(exported.parameters(), last.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=needs_fp16)])
def test_half_precision_follows_fp32(folder: Path, single: Path, precision: str) -> None:
    output = run(folder, precision, f"parallel.precision={precision}", "parallel.ep_size=2", ranks=2)
    np.testing.assert_allclose(losses(output)[:5], losses(single)[:5], atol=0.03)


@pytest.mark.parametrize(
    ("ranks", "overrides", "message"),
    [
        (1, ["model.dept=3"], "model.dept: unknown key; did you mean 'depth'?"),
        (1, ["optim.base_lr=fast"], "optim.base_lr: Input should be a valid number (given: 'fast')"),
        (1, ["parallel.ep_size=3"], "parallel.ep_size (3) must divide model.moe.num_experts (4)"),
        (1, ["parallel.ep_size=2"], "parallel.ep_size (2) must divide the number of ranks (1)"),
        (2, ["parallel.ep_size=4"], "parallel.ep_size (4) must divide the number of ranks (2)"),
        (2, ["train.global_batch=9"], "train.global_batch (9) must be a multiple of ranks x train.accumulation"),
        (2, ["data.tokens=nowhere"], "data.tokens: nowhere"),
        (2, ["tokenizer=other_tokenizer"], "was made by tokenizer 'tiny'"),
        (1, ["model.codebook_size=32"], "model.codebook_size: 32, but data.tokens"),
        (1, ["model.num_classes=4"], "model.num_classes: 4, but data.tokens"),
        (1, ["data.features=other.features"], "are not made from the same images in the same order"),
        (1, ["parallel.deepspeed=zero3.json"], "zero_optimization.stage must be 1 or 2, got 3"),
        (1, ["parallel.deepspeed=owned.json"], "'gradient_clipping' belongs into the recipe (optim.clip)"),
    ],
)
def test_bad_input_is_one_message_on_every_rank(folder: Path, ranks: int, overrides: list[str], message: str) -> None:
    if not (folder / "other_tokenizer").exists():
        make_tokenizer(folder / "other_tokenizer", seed=1)
        make_sets(folder, "0", count=39, name="other")
        (folder / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
        (folder / "owned.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}))
    overrides = [
        f"{key}={folder / value}" if (folder / value).exists() else override
        for override in overrides
        for key, value in [override.split("=")]
    ]
    output = folder / "refused"
    log = folder / "refused.log"
    log.unlink(missing_ok=True)
    with Ranks([str(folder / "recipe.yaml"), f"output_dir={output}", *overrides], ranks, log) as started:
        assert started.wait() == [2] * ranks, log.read_text()
    assert log.read_text().count(message) == 1, log.read_text()
    assert "error: " in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not output.exists()


def test_a_changed_model_is_not_resumed(folder: Path, single: Path) -> None:
    log = folder / "changed.log"
    with Ranks([str(folder / "recipe.yaml"), f"output_dir={single}", "model.drop_path=0.3"], 1, log) as started:
        assert started.wait() == [2], log.read_text()
    assert "model.drop_path: None there, 0.3 now" in log.read_text()


def test_dense_models_train_without_features_under_torchrun(folder: Path) -> None:
    recipe = write_recipe(
        folder, "model.moe=null", "objective.alignment=null", "data.features=null", "train.steps=3", name="dense.yaml"
    )
    result = launch([str(recipe), f"output_dir={folder / 'dense'}"], ranks=2)
    assert result.returncode == 0, result.stderr
    assert len(losses(folder / "dense")) == 3


@pytest.mark.parametrize("on_damaged", ["stop", "skip"])
def test_a_damaged_shard_stops_the_run_or_is_counted(folder: Path, on_damaged: str) -> None:
    """Bytes flipped in the middle of a sample: named, and then as the recipe says, on both ranks without a hang."""
    damaged = folder / f"damaged_{on_damaged}.tokens"
    shutil.copytree(folder / "train.tokens", damaged)
    shard = damaged / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    start = content.find(b"\x93NUMPY", len(content) // 2)
    content[start : start + 6] = b"broken"
    shard.write_bytes(content)
    output = folder / f"damaged_{on_damaged}"
    arguments = [f"output_dir={output}", f"data.tokens={damaged}", f"data.on_damaged={on_damaged}", "train.steps=6"]
    log = folder / f"damaged_{on_damaged}.log"
    with Ranks([str(folder / "recipe.yaml"), *arguments], 2, log) as started:
        codes = started.wait()
    assert "shard-000001.tar" in log.read_text()
    assert codes == [2 if on_damaged == "stop" else 0] * 2, log.read_text()
    if on_damaged == "stop":
        return
    train = [record for record in read_metrics(output / "metrics.jsonl") if record["event"] == "train"]
    assert train[-1]["replaced_samples"] == 1
    (record,) = [record for record in read_metrics(output / "metrics.jsonl") if record["event"] == "damaged_sample"]
    assert "shard-000001.tar" in record["damage"][0]
    assert record["count"] == 1
    finish([str(folder / "recipe.yaml"), *arguments[:-1], "train.steps=7"], 1, log)
    resumed = [r for r in read_metrics(output / "metrics.jsonl") if r["event"] == "train" and r["step"] == 7]
    assert resumed[-1]["replaced_samples"] >= 1  # the count goes on
